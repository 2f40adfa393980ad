//! The API is what its OpenAPI document says.

use anyhow::{Context, Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::world::World;

#[tokio::test]
async fn the_document_and_its_page_are_served() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let document = api
        .send(Method::GET, "/openapi.json", None)
        .await?
        .expect(StatusCode::OK)?;
    assert_eq!(document.header("content-type"), "application/json");
    let document: Value = document.json()?;
    assert_eq!(document["openapi"], "3.1.0");
    assert!(document["paths"]["/v1/cache/{key}"]["patch"].is_object());
    let page = api
        .send(Method::GET, "/docs/", None)
        .await?
        .expect(StatusCode::OK)?;
    assert!(page.header("content-type").starts_with("text/html"));
    // It works without the internet.
    for line in page.body.lines() {
        assert!(!line.contains("src=\"http"), "{line}");
    }
    Ok(())
}

/// Thousands of requests that the document allows, and such that it does not: no 5xx, and no answer that is not in it.
#[tokio::test]
async fn generated_requests_are_answered_as_the_document_says() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = std::env::split_paths(&path)
        .map(|dir| dir.join("schemathesis"))
        .find(|file| file.is_file())
        .context("schemathesis is missing: `scripts/schemathesis.sh` installs it into .dev, and needs Python 3.11")?;
    let mut command = std::process::Command::new(program);
    command
        .args(["run", &format!("{}/openapi.json", api.url)])
        .args(["--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"])
        .args(["--phases", "examples,coverage,fuzzing"])
        // The same requests each time.
        .args(["--seed", "1", "--generation-deterministic"])
        .args(["--max-examples", "20", "--no-color"])
        .current_dir(world.env.make_dir()?);
    let output = birb_nest_stack::blocking(move || Ok(command.output()?)).await?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let cases = said
        .lines()
        .find(|line| line.contains("generated"))
        .context("how many there were")?;
    println!("{cases}");
    Ok(())
}
