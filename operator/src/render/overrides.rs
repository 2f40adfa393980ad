//! What a nest says of its own pods (`api.podTemplate`, `worker.podTemplate`), laid over what the operator says of them.
//!
//! **Invariant:** what pods are selected by, what the operator's own container runs, and what that may not do cannot be
//! overridden; and no container or volume that is added opens the node to whoever may make a nest.

use k8s_openapi::{
    DeepMerge,
    api::core::v1::{Container, PodTemplateSpec},
};
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

/// What `type` of `seLinuxOptions` a container may have, by the level "baseline" of the Pod Security Standards.
const SELINUX_TYPES: &[&str] = &[
    "",
    "container_t",
    "container_init_t",
    "container_kvm_t",
    "container_engine_t",
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
    for container in containers(&mut merged) {
        // Who says nothing means true.
        let context = container.security_context.get_or_insert_default();
        context.allow_privilege_escalation.get_or_insert(false);
    }
    let merged = json(&merged);
    let changed = |field: &&&str| merged.pointer(field) != template.pointer(field);
    if let Some(field) = ESSENTIALS.iter().find(changed) {
        return Err(format!("{} cannot be overridden", dotted(field)));
    }
    if let Some(field) = opens_node(&merged) {
        return Err(format!("{} is not allowed", dotted(&field)));
    }
    *template = merged;
    Ok(child)
}

fn containers(template: &mut PodTemplateSpec) -> impl Iterator<Item = &mut Container> {
    let spec = template.spec.as_mut();
    let both = spec.map(|spec| (&mut spec.containers, spec.init_containers.as_mut()));
    both.into_iter()
        .flat_map(|(own, init)| own.iter_mut().chain(init.into_iter().flatten()))
}

/// Where `template` asks for something of the node. As the level "baseline" of the Pod Security Standards has it, and not to
/// be root: whoever may make a nest need not be who may make such pods, where no namespace is labelled for that.
fn opens_node(template: &Value) -> Option<String> {
    let items = |list: String| -> Vec<(String, Value)> {
        let all = template.pointer(&list).and_then(Value::as_array);
        let indexed = all.into_iter().flatten().cloned().enumerate();
        indexed
            .map(|(index, item)| (format!("{list}/{index}"), item))
            .collect()
    };
    let mut volumes = items("/spec/volumes".to_owned()).into_iter();
    if let Some((path, _)) = volumes.find(|(_, volume)| !volume["hostPath"].is_null()) {
        return Some(format!("{path}/hostPath"));
    }
    let opens = |path: &str, context: &Value| {
        opened(context).map(|field| format!("{path}/securityContext{field}"))
    };
    if let Some(field) = opens("/spec", &template["spec"]["securityContext"]) {
        return Some(field);
    }
    let mut containers = items("/spec/initContainers".to_owned());
    containers.extend(items("/spec/containers".to_owned()));
    containers.into_iter().find_map(|(path, container)| {
        if let Some(field) = opens(&path, &container["securityContext"]) {
            return Some(field);
        }
        let mut ports = items(format!("{path}/ports")).into_iter();
        let host = ports.find(|(_, port)| !port["hostPort"].is_null());
        host.map(|(path, _)| format!("{path}/hostPort"))
    })
}

/// What the security context of a pod or container opens.
fn opened(context: &Value) -> Option<&'static str> {
    let is = |field: &str, value: Value| context.pointer(field) == Some(&value);
    let has = |field: &str| {
        let found = context.pointer(field);
        found.is_some_and(|found| !found.is_null() && *found != json(&[(); 0]))
    };
    let selinux_type = context.pointer("/seLinuxOptions/type");
    let fields = [
        ("/privileged", is("/privileged", true.into())),
        (
            "/allowPrivilegeEscalation",
            is("/allowPrivilegeEscalation", true.into()),
        ),
        ("/runAsNonRoot", is("/runAsNonRoot", false.into())),
        ("/runAsUser", is("/runAsUser", 0.into())),
        ("/capabilities/add", has("/capabilities/add")),
        (
            "/seccompProfile/type",
            is("/seccompProfile/type", "Unconfined".into()),
        ),
        (
            "/appArmorProfile/type",
            is("/appArmorProfile/type", "Unconfined".into()),
        ),
        ("/seLinuxOptions/user", has("/seLinuxOptions/user")),
        ("/seLinuxOptions/role", has("/seLinuxOptions/role")),
        (
            "/seLinuxOptions/type",
            selinux_type.is_some_and(|it| !SELINUX_TYPES.iter().any(|known| it == known)),
        ),
        ("/procMount", has("/procMount")),
        ("/sysctls", has("/sysctls")),
        ("/windowsOptions", has("/windowsOptions")),
    ];
    let mut fields = fields.into_iter();
    fields.find_map(|(field, is_asked)| is_asked.then_some(field))
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
    fn nothing_that_is_added_opens_the_node() {
        let pod = |context: &str| format!("{{spec: {{securityContext: {context}}}}}");
        let sidecar = |context: &str| {
            format!(
                "{{spec: {{containers: [{{name: x, image: it, securityContext: {context}}}]}}}}"
            )
        };
        for (text, field) in [
            (
                "{spec: {volumes: [{name: node, hostPath: {path: /}}]}}".to_owned(),
                "spec.volumes[1].hostPath",
            ),
            (
                "{spec: {securityContext: {sysctls: [{name: kernel.msgmax, value: '1'}]}}}".to_owned(),
                "spec.securityContext.sysctls",
            ),
            (
                "{spec: {containers: [{name: x, image: it, ports: [{containerPort: 1, hostPort: 1}]}]}}".to_owned(),
                "spec.containers[1].ports[0].hostPort",
            ),
            (
                "{spec: {initContainers: [{name: x, image: it, securityContext: {privileged: true}}]}}".to_owned(),
                "spec.initContainers[0].securityContext.privileged",
            ),
            (
                sidecar("{privileged: true}"),
                "spec.containers[1].securityContext.privileged",
            ),
            (
                sidecar("{allowPrivilegeEscalation: true}"),
                "spec.containers[1].securityContext.allowPrivilegeEscalation",
            ),
            (
                sidecar("{runAsNonRoot: false}"),
                "spec.containers[1].securityContext.runAsNonRoot",
            ),
            (
                sidecar("{runAsUser: 0}"),
                "spec.containers[1].securityContext.runAsUser",
            ),
            (
                sidecar("{capabilities: {add: [SYS_ADMIN]}}"),
                "spec.containers[1].securityContext.capabilities.add",
            ),
            (
                sidecar("{seccompProfile: {type: Unconfined}}"),
                "spec.containers[1].securityContext.seccompProfile.type",
            ),
            (
                sidecar("{procMount: Unmasked}"),
                "spec.containers[1].securityContext.procMount",
            ),
            (
                sidecar("{windowsOptions: {hostProcess: true}}"),
                "spec.containers[1].securityContext.windowsOptions",
            ),
            (
                sidecar("{appArmorProfile: {type: Unconfined}}"),
                "spec.containers[1].securityContext.appArmorProfile.type",
            ),
            (
                sidecar("{seLinuxOptions: {type: spc_t}}"),
                "spec.containers[1].securityContext.seLinuxOptions.type",
            ),
            (
                sidecar("{seLinuxOptions: {user: system_u}}"),
                "spec.containers[1].securityContext.seLinuxOptions.user",
            ),
            (
                sidecar("{seLinuxOptions: {role: system_r}}"),
                "spec.containers[1].securityContext.seLinuxOptions.role",
            ),
            (
                pod("{appArmorProfile: {type: Unconfined}}"),
                "spec.securityContext.appArmorProfile.type",
            ),
            (
                pod("{windowsOptions: {hostProcess: true}}"),
                "spec.securityContext.windowsOptions",
            ),
            (pod("{runAsUser: 0}"), "spec.securityContext.runAsUser"),
        ] {
            assert_eq!(over(&text), Err(format!("{field} is not allowed")), "{text}");
        }
        let harmless = "{privileged: false, allowPrivilegeEscalation: false, runAsUser: 5, capabilities: {drop: [ALL]},
            appArmorProfile: {type: RuntimeDefault}, seLinuxOptions: {type: container_t, level: 's0:c1'}}";
        over(&sidecar(harmless)).unwrap();
    }

    #[test]
    fn a_container_that_says_nothing_may_not_gain_privileges() {
        let added = "{spec: {initContainers: [{name: first, image: it}], containers: [{name: beside, image: it}]}}";
        let template = over(added).unwrap().object["spec"]["template"].take();
        for container in ["initContainers/0", "containers/0", "containers/1"] {
            let field = format!("/spec/{container}/securityContext/allowPrivilegeEscalation");
            assert_eq!(template.pointer(&field), Some(&false.into()), "{container}");
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
