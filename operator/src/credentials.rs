//! Secrets: those the operator makes for managed servers, and those a nest refers to.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Secret};
use kube::api::PostParams;
use rand::{Rng, distr::Alphanumeric};
use serde_json::json;

use crate::{
    api::{DeletionPolicy, Reason, SecretKey},
    apply,
    error::Result,
    pass::{Pass, child_error},
    render::{self, CONTROLLER, GeneratedSecret, Inputs, Kind},
};

/// 32 letters and digits: 190 bits.
const PASSWORD_LENGTH: usize = 32;

/// Makes the Secrets of managed servers that are missing.
///
/// # Errors
/// What may go better the next time.
pub async fn ensure(pass: &mut Pass<'_>) -> Result<()> {
    for secret in render::generated_secrets(&pass.nest) {
        let found = apply::objects(&pass.context.client, &pass.nest, Kind::Secret)
            .get_metadata_opt(&secret.name)
            .await
            .map_err(|source| child_error("look at", Kind::Secret, &secret.name, source))?;
        match found {
            None => make(pass, &secret).await?,
            Some(found) => {
                let problem = apply::foreign(&pass.nest, Kind::Secret, &found.metadata);
                pass.findings.problems.extend(problem);
            }
        }
    }
    Ok(())
}

async fn make(pass: &mut Pass<'_>, secret: &GeneratedSecret) -> Result<()> {
    if let Some(volume) = &secret.volume {
        let found = pass
            .of::<PersistentVolumeClaim>()
            .get_metadata_opt(volume)
            .await
            .map_err(|source| {
                child_error("look at the volume of", Kind::Secret, &secret.name, source)
            })?;
        match found {
            Some(claim) if claim.metadata.deletion_timestamp.is_some() => {
                pass.problem(
                    Reason::WaitingForDependencies,
                    format!("PersistentVolumeClaim {volume} is being deleted; waiting for its end"),
                );
                return Ok(());
            }
            Some(_) => {
                pass.problem(
                    Reason::CredentialsLost,
                    format!(
                        "Secret {name} is gone, and PersistentVolumeClaim {volume} holds data that only its password opens; put \
                         the Secret back, or, to begin with an empty volume: kubectl delete statefulset {name}, then \
                         kubectl delete pvc {volume}",
                        name = secret.name
                    ),
                );
                return Ok(());
            }
            None => {}
        }
    }
    if pass.is_paused() {
        return Ok(());
    }
    let password: String = rand::rng()
        .sample_iter(Alphanumeric)
        .take(PASSWORD_LENGTH)
        .map(char::from)
        .collect();
    let mut object = secret.object(&pass.nest, &password);
    if pass.nest.deletion_policy == DeletionPolicy::Delete {
        object["metadata"]["ownerReferences"] = json!([render::owner_reference(&pass.nest)]);
    }
    let object: Secret = serde_json::from_value(object).expect("a test sends it through its type");
    let params = PostParams {
        field_manager: Some(CONTROLLER.to_owned()),
        ..PostParams::default()
    };
    pass.context.may_write()?;
    // Created, not applied: should another one be there by now, it stays.
    let created = pass.of::<Secret>().create(&params, &object).await;
    if let Err(source) = created {
        let error = child_error("create", Kind::Secret, &secret.name, source);
        // A quota or a policy: told like any other object that is refused.
        let refusal = apply::refusal(&error).ok_or(error)?;
        pass.findings.problems.push(refusal.into());
        return Ok(());
    }
    tracing::info!("made Secret {}/{}", pass.nest.namespace, secret.name);
    Ok(())
}

/// Reads the keys that the nest's pods read. What is missing is among the problems afterwards.
///
/// # Errors
/// What may go better the next time.
pub async fn read(pass: &mut Pass<'_>) -> Result<Inputs> {
    let mut by_secret: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for key in render::secret_keys(&pass.nest) {
        by_secret.entry(key.name).or_default().insert(key.key);
    }
    let generated: BTreeSet<String> = render::generated_secrets(&pass.nest)
        .into_iter()
        .map(|secret| secret.name)
        .collect();
    let mut inputs = Inputs::default();
    for (name, keys) in by_secret {
        let found = pass
            .of::<Secret>()
            .get_opt(&name)
            .await
            .map_err(|source| child_error("read", Kind::Secret, &name, source))?;
        let Some(secret) = found else {
            // One that could not be made has its own problem already.
            if !generated.contains(&name) {
                let keys = keys.into_iter().collect::<Vec<_>>().join(", ");
                let message = format!(
                    "Secret {name} in namespace {} is not there; the nest reads its keys: {keys}",
                    pass.nest.namespace
                );
                pass.problem(Reason::SecretMissing, message);
            }
            continue;
        };
        let mut data = secret.data.unwrap_or_default();
        for key in keys {
            match data.remove(&key) {
                Some(bytes) if !bytes.0.is_empty() => {
                    let name = name.clone();
                    inputs.insert(SecretKey { name, key }, bytes.0);
                }
                _ => {
                    let message = format!(
                        "Secret {name} in namespace {} has no key {key}, or an empty one; the nest reads it",
                        pass.nest.namespace
                    );
                    pass.problem(Reason::SecretMissing, message);
                }
            }
        }
    }
    Ok(inputs)
}
