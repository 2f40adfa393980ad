//! The OpenAPI document: generated from the handlers, and completed with what holds for all of them.

use std::sync::OnceLock;

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use utoipa::{
    OpenApi,
    openapi::{
        self, Content, Ref, RefOr, ResponseBuilder,
        path::Operation,
        security::{
            ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme,
        },
    },
};

use crate::{access::Role, error::Code, router, schemas::Error};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "birb-nest",
        description = "A persistent cache. docs/API.md is the contract in words.",
        license(name = "MIT", identifier = "MIT")
    ),
    components(schemas(Error, Code))
)]
struct Base;

/// What the document begins with.
pub fn base() -> openapi::OpenApi {
    Base::openapi()
}

static DOCUMENT: OnceLock<String> = OnceLock::new();

/// GET /openapi.json: this document.
#[utoipa::path(get, path = "/openapi.json", tag = "about", responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value)))]
pub async fn document() -> Response {
    let text = DOCUMENT.get_or_init(|| {
        let document = router::openapi().to_json();
        document.expect("the document becomes JSON")
    });
    ([(header::CONTENT_TYPE, "application/json")], text.as_str()).into_response()
}

/// Adds what holds for all operations: keys with their roles, and the errors that any of them may answer with.
pub fn complete(mut document: openapi::OpenApi) -> openapi::OpenApi {
    let components = document.components.get_or_insert_default();
    components.add_security_scheme(
        "api_key",
        SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("X-API-Key"))),
    );
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
    components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
    for (path, item) in &mut document.paths.paths {
        for (method, operation) in [
            ("GET", &mut item.get),
            ("HEAD", &mut item.head),
            ("POST", &mut item.post),
            ("PUT", &mut item.put),
            ("PATCH", &mut item.patch),
            ("DELETE", &mut item.delete),
        ] {
            if let (Some(operation), Some(role)) = (operation, router::role_of(method, path)) {
                guard(operation, role);
            }
        }
    }
    document
}

fn guard(operation: &mut Operation, role: Role) {
    let role = role.to_string();
    operation.security = Some(vec![
        SecurityRequirement::new("api_key", [role.clone()]),
        SecurityRequirement::new("bearer", [role]),
    ]);
    for (status, when) in [
        ("400", "the request breaks a rule; `field` says which"),
        ("401", "a key is needed, and there is none or a wrong one"),
        ("403", "the key does not have the role that is needed"),
        ("406", "`Accept` does not admit JSON"),
        ("408", "the body did not arrive in time"),
        ("413", "the value or the body is too large"),
        ("414", "the key is too long"),
        ("429", "too many requests"),
        ("500", "a defect of the service"),
        (
            "503",
            "`UNAVAILABLE`: certainly nothing happened; `UNKNOWN_OUTCOME`: it may have",
        ),
        ("504", "a read took too long"),
    ] {
        let responses = &mut operation.responses.responses;
        responses
            .entry(status.to_owned())
            .or_insert_with(|| RefOr::T(error(when)));
    }
}

/// A response that is an error.
fn error(when: &str) -> openapi::Response {
    let schema = Content::new(Some(Ref::from_schema_name("Error")));
    ResponseBuilder::new()
        .description(when)
        .content("application/json", schema)
        .build()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_route_and_every_code_is_in_the_document_and_in_the_contract() {
        let document = serde_json::to_value(router::openapi()).expect("JSON");
        assert!(
            document["openapi"]
                .as_str()
                .expect("a version")
                .starts_with("3.1")
        );
        let mut described = BTreeSet::new();
        for (path, item) in document["paths"].as_object().expect("paths") {
            for method in item.as_object().expect("methods").keys() {
                if method != "head" {
                    described.insert(format!("{} {path}", method.to_uppercase()));
                }
            }
        }
        let routes: BTreeSet<String> = router::endpoints().into_iter().collect();
        assert_eq!(described, routes);
        let contract = include_str!("../../../docs/API.md");
        for route in &routes {
            let path = route.split_once(' ').expect("a path").1;
            assert!(contract.contains(path), "{path} is not in docs/API.md");
        }
        let codes = document["components"]["schemas"]["Code"]["enum"]
            .as_array()
            .expect("codes");
        assert!(codes.len() >= 14, "{codes:?}");
        for code in codes {
            let code = code.as_str().expect("a code");
            assert!(
                contract.contains(&format!("`{code}`")),
                "{code} is not in docs/API.md"
            );
        }
        for (path, item) in document["paths"].as_object().expect("paths") {
            for (method, operation) in item.as_object().expect("methods") {
                let guarded = path.starts_with("/v1/");
                assert_eq!(
                    operation.get("security").is_some(),
                    guarded,
                    "{method} {path}"
                );
                assert!(
                    operation["responses"].get("503").is_some() || !guarded,
                    "{method} {path}"
                );
            }
        }
    }

    /// Lines of the table that begins below `heading` of the contract, in cells.
    fn table(heading: &str) -> Vec<Vec<&'static str>> {
        let contract = include_str!("../../../docs/API.md");
        let (_, below) = contract.split_once(heading).expect("the heading");
        let rows = below.lines().skip_while(|line| !line.starts_with("|---"));
        let rows = rows.skip(1).take_while(|line| line.starts_with('|'));
        rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect())
            .collect()
    }

    fn statuses(cell: &str) -> impl Iterator<Item = &str> {
        let words = cell.split(|c: char| !c.is_ascii_alphanumeric());
        words.filter(|word| word.len() == 3 && word.parse::<u16>().is_ok())
    }

    #[test]
    fn what_the_contract_says_is_in_the_document() {
        let document = serde_json::to_value(router::openapi()).expect("JSON");
        let routes = table("## Routes");
        assert!(routes.len() > 20, "{routes:?}");
        for row in routes {
            let mut methods = Vec::new();
            let mut operations = Vec::new();
            for said in row[0].split('`').skip(1).step_by(2) {
                let (method, path) = said.split_once(' ').unwrap_or((said, ""));
                methods.push(method.to_lowercase());
                let path = path.split_once('?').map_or(path, |(path, _)| path);
                // The page is no part of what it shows.
                if path.is_empty() || path == "/docs/" {
                    continue;
                }
                for method in methods.drain(..) {
                    let operation = document["paths"][path].get(&method);
                    let operation = operation.unwrap_or_else(|| panic!("no {method} {path}"));
                    operations.push(operation);
                }
            }
            for status in statuses(row[2]) {
                let has =
                    |operation: &&serde_json::Value| operation["responses"].get(status).is_some();
                assert!(operations.iter().any(has), "{}: {status}", row[0]);
            }
        }
        let codes = document["components"]["schemas"]["Code"]["enum"].as_array();
        let codes = codes.expect("codes");
        let operations = document["paths"].as_object().expect("paths").values();
        let operations: Vec<_> = operations
            .flat_map(|item| item.as_object().expect("methods").values())
            .collect();
        let errors = table("## Errors");
        assert!(errors.len() > 15, "{errors:?}");
        for row in errors {
            let (status, code) = (row[0], row[1].trim_matches('`'));
            assert!(codes.iter().any(|it| it == code), "{code}");
            // No operation answers for a method that its route does not have.
            let has = |it: &&serde_json::Value| it["responses"].get(status).is_some();
            assert!(status == "405" || operations.iter().any(has), "{status}");
        }
    }
}
