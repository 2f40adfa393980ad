//! Every field of an object changed at once, as far as the API server lets anybody.

use anyhow::{Context, Result, ensure};
use birb_nest_operator::render::CONTROLLER;
use kube::{
    Api, ResourceExt,
    api::{DynamicObject, PostParams},
};
use serde_json::{Map, Value, json};

/// Fields that cannot become anything else while the object is what it is, items of lists by a star: the API server refuses it,
/// or the rest of the object does.
const FIXED: [&str; 11] = [
    "/metadata/ownerReferences/*",
    "/spec/selector",
    "/spec/template/metadata/labels/app.kubernetes.io~1component",
    "/spec/template/metadata/labels/app.kubernetes.io~1instance",
    "/spec/template/metadata/labels/app.kubernetes.io~1name",
    "/spec/podManagementPolicy",
    "/spec/serviceName",
    "/spec/volumeClaimTemplates",
    "/spec/clusterIP",
    // A volume is mounted once, and `rollingUpdate` stands beside the type.
    "/spec/template/spec/containers/*/volumeMounts/*/name",
    "/spec/strategy/type",
];

fn is_fixed(object: &Value, path: &str) -> bool {
    let is_headless = object["spec"]["clusterIP"] == "None";
    if is_headless && path == "/spec/type" {
        return true;
    }
    let stars = path.split('/').map(|part| match part.parse::<usize>() {
        Ok(_) => "*",
        Err(_) => part,
    });
    FIXED.contains(&stars.collect::<Vec<_>>().join("/").as_str())
}

/// What was changed of an object.
pub struct Edited {
    /// Its resource version since.
    pub version: Option<String>,
    /// Where fields are, and what they were.
    pub fields: Vec<(String, Value)>,
}

/// Changes each field that the operator has applied, but for [`FIXED`] ones.
///
/// # Errors
/// The API server takes no other value of one.
pub async fn edit_all(api: &Api<DynamicObject>, name: &str) -> Result<Edited> {
    // A controller may write in between.
    loop {
        let object = api.get(name).await?;
        let fields = object
            .managed_fields()
            .iter()
            .find(|entry| {
                entry.manager.as_deref() == Some(CONTROLLER)
                    && entry.operation.as_deref() == Some("Apply")
            })
            .and_then(|entry| entry.fields_v1.clone())
            .with_context(|| format!("{name} was not applied"))?;
        let before = serde_json::to_value(&object)?;
        let mut paths = Vec::new();
        leaves(&fields.0, &before, String::new(), &mut paths);
        let try_out = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        let (mut edited, mut done) = (before.clone(), Vec::new());
        for path in paths {
            let was = before.pointer(&path).context("a leaf is there")?.clone();
            let mut other = None;
            for value in others(&was) {
                let mut next = edited.clone();
                *next.pointer_mut(&path).context("a leaf is there")? = value;
                let typed = serde_json::from_value(next.clone())?;
                // One that the API server takes and does not keep cannot drift.
                let taken = api.replace(name, &try_out, &typed).await;
                let kept = taken.ok().map(serde_json::to_value).transpose()?;
                if kept.is_some_and(|kept| is_same(kept.pointer(&path), next.pointer(&path))) {
                    other = Some(next);
                    break;
                }
            }
            ensure!(
                other.is_some() || is_fixed(&before, &path),
                "{name}: no other value than {was} is taken at {path}"
            );
            if let Some(other) = other {
                edited = other;
                done.push((path, was));
            }
        }
        let typed = serde_json::from_value(edited)?;
        match api.replace(name, &PostParams::default(), &typed).await {
            Ok(object) => {
                return Ok(Edited {
                    version: object.resource_version(),
                    fields: done,
                });
            }
            Err(kube::Error::Api(status)) if status.is_conflict() => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Pointers to the leaves of `fields`, in the notation of managed fields, within `object`. Keys of list items are none: who
/// changes one adds an item of his own.
fn leaves(fields: &Value, object: &Value, path: String, found: &mut Vec<String>) {
    let members = fields.as_object().into_iter().flatten();
    let mut is_leaf = true;
    for (name, below) in members {
        if let Some(field) = name.strip_prefix("f:") {
            is_leaf = false;
            let field_path = format!("{path}/{}", field.replace('~', "~0").replace('/', "~1"));
            if let Some(inner) = object.get(field) {
                leaves(below, inner, field_path, found);
            }
        } else if let Some(key) = name.strip_prefix("k:") {
            is_leaf = false;
            let key: Value = serde_json::from_str(key).unwrap_or_default();
            let items = object.as_array().into_iter().flatten();
            for (index, item) in items.enumerate() {
                let fits = |key: &Value| {
                    let mut members = key.as_object().into_iter().flatten();
                    members.all(|(name, value)| &item[name] == value)
                };
                // Such as the name of a pull secret, beside which nothing can be said.
                let is_all_key = item.as_object().map(Map::len) == key.as_object().map(Map::len);
                if fits(&key) && !is_all_key {
                    let mut below = below.clone();
                    if let (Some(below), Some(key)) = (below.as_object_mut(), key.as_object()) {
                        below.retain(|name, _| {
                            !name
                                .strip_prefix("f:")
                                .is_some_and(|name| key.contains_key(name))
                        });
                    }
                    leaves(&below, item, format!("{path}/{index}"), found);
                }
            }
        } else if name == "." {
            // The item or map itself, beside its members.
            is_leaf = false;
        }
    }
    if is_leaf {
        found.push(path);
    }
}

/// Other values of the same type.
fn others(value: &Value) -> Vec<Value> {
    match value {
        Value::Bool(value) => vec![json!(!value)],
        Value::Number(number) => {
            let number = number.as_i64().unwrap_or_default();
            vec![json!(number + 1), json!(number - 1)]
        }
        Value::String(text) => {
            let other = ["x", "1"].iter().map(|end| json!(format!("{text}{end}")));
            // Names of what Kubernetes lets one choose from, sizes, and ports.
            let choices = [
                "Always",
                "File",
                "Unconfined",
                "NodePort",
                "IfHealthyBudget",
                "Never",
                "IfNotPresent",
                "Delete",
                "Retain",
                "OrderedReady",
                "Recreate",
                "Default",
                "ScheduleAnyway",
                "UDP",
                "77Mi",
                "77Gi",
                "7m",
                "1%",
            ];
            let choices = choices.into_iter().filter(|choice| choice != text);
            other.chain(choices.map(|choice| json!(choice))).collect()
        }
        Value::Object(members) => {
            let mut more = members.clone();
            more.insert("drifted".to_owned(), json!("x"));
            vec![Value::Object(more), json!({})]
        }
        Value::Array(items) => {
            let mut more = items.clone();
            more.push(json!("drifted"));
            let egress = [items.as_slice(), &[json!("Egress")]].concat();
            let mut all = vec![more, egress];
            for (index, item) in items.iter().enumerate() {
                all.extend(within(item).into_iter().map(|other| {
                    let mut items = items.clone();
                    items[index] = other;
                    items
                }));
            }
            all.push(items[..items.len().saturating_sub(1)].to_vec());
            all.into_iter().map(Value::Array).collect()
        }
        Value::Null => Vec::new(),
    }
}

/// `value` with one of its members another, however deep.
fn within(value: &Value) -> Vec<Value> {
    let Value::Object(members) = value else {
        return others(value);
    };
    let with = |name: &String, other: Value| {
        let mut members = members.clone();
        members.insert(name.clone(), other);
        Value::Object(members)
    };
    let each = members.iter().flat_map(|(name, member)| {
        within(member)
            .into_iter()
            .map(move |other| with(name, other))
    });
    each.collect()
}

/// Whether both mean the same: what says nothing is left out.
fn is_same(one: Option<&Value>, other: Option<&Value>) -> bool {
    let said = |value: Option<&Value>| {
        let nothing = [
            json!(null),
            json!(false),
            json!(0),
            json!(""),
            json!([]),
            json!({}),
        ];
        value.filter(|value| !nothing.contains(value)).cloned()
    };
    said(one) == said(other)
}
