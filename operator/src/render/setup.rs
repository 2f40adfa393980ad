//! The Job that runs `birb-nest setup`: migrations, streams, the claim on Redis.

use serde_json::json;

use super::{Child, Inputs, Kind, Names, data_plane::Settings, pod::env};
use crate::resolve::Nest;

/// Name of its container.
pub const CONTAINER: &str = "setup";
/// Exit code of the data plane: a server cannot be reached or logged in to now (docs/OPERATIONS.md).
const TRY_AGAIN: i32 = 75;
/// Exit code of the data plane: a person must change something.
const REFUSED: i32 = 78;

/// The Job for these settings. Its name says which they are, so it never changes; it is kept when it has ended.
pub fn setup(nest: &Nest, inputs: &Inputs) -> Child {
    let settings = Settings::new(nest);
    let fingerprint = settings.fingerprint(nest, inputs);
    let container = json!({
        "name": CONTAINER,
        "args": ["setup"],
        // The operator reads its last words, one object per line, and shows them in a condition.
        "env": [env("LOG_LEVEL", "info"), env("LOG_FORMAT", "json")],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": {
            "requests": { "cpu": "50m", "memory": "64Mi" },
            "limits": { "memory": "256Mi" },
        },
    });
    let rest = json!({ "restartPolicy": "Never", "terminationGracePeriodSeconds": 10 });
    let template = settings.pod(nest, "setup", inputs, container, rest);
    let exits = |operator, values: &[i32]| json!({ "containerName": CONTAINER, "operator": operator, "values": values });
    let body = json!({ "spec": {
        "backoffLimit": 2,
        "podFailurePolicy": { "rules": [
            { "action": "Ignore", "onExitCodes": exits("In", &[TRY_AGAIN]) },
            { "action": "FailJob", "onExitCodes": exits("In", &[REFUSED]) },
            { "action": "Ignore", "onPodConditions": [{ "type": "DisruptionTarget", "status": "True" }] },
        ] },
        "template": template,
    } });
    let name = Names(&nest.name).setup(&fingerprint[..8]);
    Child::new(nest, Kind::Job, name, "setup", body)
}
