//! What a nest says of its own pods (`api.podTemplate`, `worker.podTemplate`), laid over what the operator says of them.
//!
//! **Invariant:** what pods are selected by, what they run, and what they may not do cannot be overridden.

use k8s_openapi::{DeepMerge, api::core::v1::PodTemplateSpec};
use serde_json::Value;

use super::{Child, json};

/// Most bytes of an override, as JSON.
const LIMIT: usize = 16 << 10;

/// What is the operator's alone, below the template. The first container is its own; others may be added.
const ESSENTIALS: &[&str] = &[
    "/metadata/labels/app.kubernetes.io~1name",
    "/metadata/labels/app.kubernetes.io~1instance",
    "/metadata/labels/app.kubernetes.io~1component",
    "/metadata/annotations/cache.birb.party~1inputs",
    "/metadata/annotations/cache.birb.party~1restart",
    // Whoever may make a nest must not thereby be any ServiceAccount.
    "/spec/serviceAccountName",
    "/spec/serviceAccount",
    "/spec/automountServiceAccountToken",
    "/spec/hostNetwork",
    "/spec/hostPID",
    "/spec/hostIPC",
    "/spec/restartPolicy",
    "/spec/securityContext/runAsNonRoot",
    "/spec/securityContext/seccompProfile",
    "/spec/containers/0/name",
    "/spec/containers/0/image",
    "/spec/containers/0/command",
    "/spec/containers/0/args",
    "/spec/containers/0/securityContext/allowPrivilegeEscalation",
    "/spec/containers/0/securityContext/capabilities",
    "/spec/containers/0/securityContext/privileged",
    "/spec/containers/0/securityContext/readOnlyRootFilesystem",
    "/spec/containers/0/securityContext/runAsNonRoot",
    "/spec/containers/0/securityContext/seccompProfile",
];

/// `child`, a Deployment, with `over` laid over the template of its pods. Lists whose items have a name are merged by it, as
/// `kubectl patch` does.
///
/// # Errors
/// A sentence about what is wrong with `over`.
pub fn overridden(mut child: Child, over: &Value) -> Result<Child, String> {
    if over.to_string().len() > LIMIT {
        return Err(format!("it has more than {LIMIT} bytes"));
    }
    let typed: PodTemplateSpec = serde_json::from_value(over.clone())
        .map_err(|error| format!("it does not fit a pod template: {error}"))?;
    if let Some(field) = lost(over, &json(&typed), String::new()) {
        return Err(format!("a pod template has no field {}", dotted(&field)));
    }
    let template = &mut child.object["spec"]["template"];
    let mut merged: PodTemplateSpec =
        serde_json::from_value(template.clone()).expect("a test sends it through its type");
    merged.merge_from(typed);
    let merged = json(&merged);
    let changed = |field: &&&str| merged.pointer(field) != template.pointer(field);
    if let Some(field) = ESSENTIALS.iter().find(changed) {
        return Err(format!("{} cannot be overridden", dotted(field)));
    }
    *template = merged;
    Ok(child)
}

/// Where `kept` lacks something that `given` has.
fn lost(given: &Value, kept: &Value, path: String) -> Option<String> {
    match (given, kept) {
        (Value::Object(given), Value::Object(kept)) => given
            .iter()
            .filter(|(_, value)| !value.is_null())
            .find_map(|(name, value)| {
                let below = format!("{path}/{}", name.replace('~', "~0").replace('/', "~1"));
                match kept.get(name) {
                    Some(kept) => lost(value, kept, below),
                    None => Some(below),
                }
            }),
        (Value::Array(given), Value::Array(kept)) => {
            let mut pairs = given.iter().zip(kept).enumerate();
            pairs.find_map(|(index, (given, kept))| lost(given, kept, format!("{path}/{index}")))
        }
        _ => None,
    }
}

/// `/spec/containers/0/args` as people write it: `spec.containers[0].args`.
fn dotted(pointer: &str) -> String {
    let mut text = String::new();
    for part in pointer.split('/').skip(1) {
        let part = part.replace("~1", "/").replace("~0", "~");
        if part.bytes().all(|byte| byte.is_ascii_digit()) {
            text.push_str(&format!("[{part}]"));
        } else {
            if !text.is_empty() {
                text.push('.');
            }
            text.push_str(&part);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        render::{Inputs, api, worker},
        testing,
    };

    fn over(text: &str) -> Result<Child, String> {
        let child = api(&testing::nest("{}"), &Inputs::default(), Some(2));
        overridden(child, &serde_yaml::from_str(text).unwrap())
    }

    #[test]
    fn an_override_is_laid_over_what_is_there() {
        let child = over("
metadata: {labels: {team: birds}, annotations: {scrape: 'yes'}}
spec:
  priorityClassName: high
  nodeSelector: {disk: fast}
  tolerations: [{key: spot, operator: Exists}]
  terminationGracePeriodSeconds: 60
  containers:
    - {name: api, env: [{name: LOG_LEVEL, value: debug}, {name: EXTRA, value: it}], livenessProbe: {failureThreshold: 9}}
    - {name: sidecar, image: mirror.example/sidecar}
")
        .unwrap();
        let plain = api(&testing::nest("{}"), &Inputs::default(), Some(2));
        assert_ne!(child, plain);
        insta::assert_snapshot!("overridden", serde_yaml::to_string(&child.object).unwrap());
    }

    #[test]
    fn nothing_said_is_nothing_changed() {
        let nest = testing::nest("{}");
        for child in [
            api(&nest, &Inputs::default(), Some(2)),
            worker(&nest, &Inputs::default(), None),
        ] {
            let same = overridden(child.clone(), &serde_json::json!({}));
            assert_eq!(same, Ok(child));
        }
    }

    #[test]
    fn what_is_the_operators_alone_is_refused_by_name() {
        for (text, field) in [
            (
                "{metadata: {labels: {app.kubernetes.io/component: web}}}",
                "metadata.labels.app.kubernetes.io/component",
            ),
            (
                "{metadata: {annotations: {cache.birb.party/inputs: x}}}",
                "metadata.annotations.cache.birb.party/inputs",
            ),
            (
                "{spec: {automountServiceAccountToken: true}}",
                "spec.automountServiceAccountToken",
            ),
            (
                "{spec: {serviceAccountName: admin}}",
                "spec.serviceAccountName",
            ),
            ("{spec: {hostNetwork: true}}", "spec.hostNetwork"),
            (
                "{spec: {securityContext: {runAsNonRoot: false}}}",
                "spec.securityContext.runAsNonRoot",
            ),
            (
                "{spec: {containers: [{name: api, image: other}]}}",
                "spec.containers[0].image",
            ),
            (
                "{spec: {containers: [{name: api, command: [sh]}]}}",
                "spec.containers[0].command",
            ),
            (
                "{spec: {containers: [{name: api, args: [worker]}]}}",
                "spec.containers[0].args",
            ),
            (
                "{spec: {containers: [{name: api, securityContext: {privileged: true}}]}}",
                "spec.containers[0].securityContext.privileged",
            ),
            (
                "{spec: {containers: [{name: api, securityContext: {capabilities: {add: [NET_RAW]}}}]}}",
                "spec.containers[0].securityContext.capabilities",
            ),
            (
                "{spec: {containers: [{name: api, securityContext: {readOnlyRootFilesystem: false}}]}}",
                "spec.containers[0].securityContext.readOnlyRootFilesystem",
            ),
        ] {
            assert_eq!(
                over(text),
                Err(format!("{field} cannot be overridden")),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_no_pod_template_is_refused_with_its_place() {
        for (text, words) in [
            ("{spec: {tolerance: []}}", "no field spec.tolerance"),
            (
                "{spec: {containers: [{name: api, envs: []}]}}",
                "no field spec.containers[0].envs",
            ),
            ("{spec: {containers: api}}", "does not fit a pod template"),
            ("{template: {}}", "no field template"),
        ] {
            let refused = over(text).unwrap_err();
            assert!(refused.contains(words), "{text}: {refused}");
        }
        let long = format!(
            "{{metadata: {{annotations: {{a: {}}}}}}}",
            "x".repeat(LIMIT)
        );
        assert!(over(&long).unwrap_err().contains("more than 16384 bytes"));
    }
}
