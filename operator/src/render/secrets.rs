//! Credentials of managed servers. They are made once, never rendered again, and never repaired: what is in a volume was
//! made with them.

use serde_json::{Value, json};

use super::{Kind, Names, names};
use crate::{api::SecretKey, resolve::Nest};

/// User (or role) of the managed servers.
pub(super) const USER: &str = "birb";
/// Key of the password in each generated Secret.
const PASSWORD: &str = "password";
/// Key of the part of a server's configuration that holds the password.
pub(super) const AUTH: &str = "auth.conf";

/// A Secret that is made when it is missing.
#[derive(Clone, Debug)]
pub struct GeneratedSecret {
    /// Its name.
    pub name: String,
    component: &'static str,
    /// Around the password: the server's configuration.
    auth: Option<fn(&str) -> String>,
    /// The volume whose data only this password opens.
    pub volume: Option<String>,
}

/// The Secrets of the managed servers of `nest`.
pub fn generated_secrets(nest: &Nest) -> Vec<GeneratedSecret> {
    let names = Names(&nest.name);
    let mut secrets = Vec::new();
    if nest.redis.managed().is_some() {
        secrets.push(GeneratedSecret {
            name: names.redis(),
            component: "redis",
            auth: Some(|password| format!("requirepass {password}\n")),
            volume: None,
        });
    }
    if nest.nats.managed().is_some() {
        secrets.push(GeneratedSecret {
            name: names.nats(),
            component: "nats",
            auth: Some(|password| {
                format!("authorization {{ user: {USER}, password: \"{password}\" }}\n")
            }),
            // NATS reads its password from the Secret at each start.
            volume: None,
        });
    }
    if nest.postgres.managed().is_some() {
        secrets.push(GeneratedSecret {
            volume: Some(names.volume(&names.postgres())),
            name: names.postgres(),
            component: "postgres",
            auth: None,
        });
    }
    secrets
}

impl GeneratedSecret {
    /// The Secret with `password`, which consists of letters and digits; without an owner.
    pub fn object(&self, nest: &Nest, password: &str) -> Value {
        let mut data = json!({ "username": USER, PASSWORD: password });
        if let Some(auth) = self.auth {
            data[AUTH] = auth(password).into();
        }
        let resource = Kind::Secret.api_resource();
        json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": {
                "name": self.name,
                "namespace": nest.namespace,
                "labels": names::labels(nest, self.component),
            },
            "type": "Opaque",
            "stringData": data,
        })
    }
}

/// Where the password of the managed server called `name` is.
pub(super) fn password(name: String) -> SecretKey {
    SecretKey {
        name,
        key: PASSWORD.to_owned(),
    }
}

/// Where the part of its configuration with the password is.
pub(super) fn auth(name: String) -> SecretKey {
    SecretKey {
        name,
        key: AUTH.to_owned(),
    }
}
