//! Who may do what: keys with roles, read from a file that may change while the process runs.
//!
//! Keys are kept and compared as their SHA-256, all of them each time, so that neither their lengths nor how much of one was
//! guessed shows in the time that a refusal takes.

use std::{fmt, path::Path, str::FromStr, sync::Arc, time::Duration};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use birb_nest_store::OpenError;
use futures::{FutureExt, future::BoxFuture};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::watch;

use crate::{
    error::{ApiError, Code},
    metrics, router,
    state::AppState,
};

/// How often the file is looked at. A mounted Secret follows its object within a minute or two.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Shorter keys can be guessed.
const MIN_KEY_BYTES: usize = 16;
const MAX_KEY_BYTES: usize = 256;

/// What a key allows; each role includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Reads of single keys and of batches.
    Read,
    /// Writes and deletes of such.
    Write,
    /// What concerns all keys, or shows the inside: lists, deletes by prefix, rehydration, dead letters, debugging.
    Admin,
}

/// The keys that are valid now.
#[derive(Debug, Default)]
pub struct Keyring(Vec<Entry>);

#[derive(Debug)]
struct Entry {
    name: Arc<str>,
    role: Role,
    digest: Digest,
}

/// What is kept of a key. It has no `==`: there is one comparison, which takes as long whatever it finds.
#[derive(Debug)]
struct Digest([u8; 32]);

impl Digest {
    fn of(key: &[u8]) -> Self {
        Self(Sha256::digest(key).into())
    }

    fn is(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

/// The key of a request, by its name.
#[derive(Debug, Clone)]
pub struct Holder {
    pub name: Arc<str>,
    role: Role,
}

impl FromStr for Role {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "read" => Ok(Self::Read),
            "write" => Ok(Self::Write),
            "admin" => Ok(Self::Admin),
            _ => Err(()),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Admin => "admin",
        })
    }
}

impl Keyring {
    /// Parses lines of `ROLE NAME KEY`; empty ones and those that begin with `#` are passed over.
    ///
    /// # Errors
    /// A sentence that names the line, and never a key.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut keys: Vec<Entry> = Vec::new();
        for (n, line) in text
            .lines()
            .enumerate()
            .map(|(n, line)| (n + 1, line.trim()))
        {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let words: Vec<&str> = line.split_whitespace().collect();
            let [role, name, key] = words[..] else {
                anyhow::bail!("line {n}: `ROLE NAME KEY` is expected");
            };
            let Ok(role) = role.parse() else {
                anyhow::bail!("line {n}: the role is read, write or admin");
            };
            if !(MIN_KEY_BYTES..=MAX_KEY_BYTES).contains(&key.len())
                || !key.bytes().all(|byte| byte.is_ascii_graphic())
            {
                anyhow::bail!(
                    "line {n}: the key of `{name}` is not {MIN_KEY_BYTES} to {MAX_KEY_BYTES} visible ASCII characters"
                );
            }
            let digest = Digest::of(key.as_bytes());
            if keys.iter().any(|other| *other.name == *name) {
                anyhow::bail!("line {n}: the name `{name}` is there twice");
            }
            if keys.iter().any(|other| other.digest.is(&digest)) {
                anyhow::bail!("line {n}: the key of `{name}` is there twice");
            }
            keys.push(Entry {
                name: name.into(),
                role,
                digest,
            });
        }
        if keys.is_empty() {
            anyhow::bail!("it has no keys: nobody could do anything");
        }
        Ok(Self(keys))
    }

    fn holder(&self, presented: &[u8]) -> Option<Holder> {
        let digest = Digest::of(presented);
        let mut found = None;
        for entry in &self.0 {
            if entry.digest.is(&digest) {
                found = Some(entry);
            }
        }
        found.map(|entry| Holder {
            name: entry.name.clone(),
            role: entry.role,
        })
    }
}

/// Reads the keys, and gives the work of following the file, which never ends: keys that nobody follows are never revoked.
///
/// # Errors
/// The file cannot be read, or a line is wrong. Later that is logged and counted, and the keys stay as they were.
pub async fn follow(
    path: &Path,
) -> Result<(watch::Receiver<Keyring>, BoxFuture<'static, ()>), OpenError> {
    let what = format!("API_KEYS_FILE {}", path.display());
    let mut text = tokio::fs::read_to_string(path)
        .await
        .map_err(|error| OpenError::refused(&what, error))?;
    let keys = Keyring::parse(&text).map_err(|error| OpenError::refused(&what, error))?;
    tracing::info!(n_keys = keys.0.len(), "requests need a key");
    let (sender, receiver) = watch::channel(keys);
    let path = path.to_owned();
    let following = async move {
        let mut complained = false;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let read = async {
                let new = tokio::fs::read_to_string(&path).await?;
                let keys = (new != text).then(|| Keyring::parse(&new)).transpose()?;
                anyhow::Ok(keys.map(|keys| (new, keys)))
            };
            match read.await {
                Ok(changed) => {
                    complained = false;
                    if let Some((new, keys)) = changed {
                        tracing::info!(
                            n_keys = keys.0.len(),
                            "API_KEYS_FILE has changed: its keys are valid now"
                        );
                        text = new;
                        sender.send_replace(keys);
                    }
                }
                Err(error) => {
                    metrics::keys_not_read();
                    if !std::mem::replace(&mut complained, true) {
                        tracing::error!(
                            "API_KEYS_FILE {} cannot be used, the keys from before stay valid: {error:#}",
                            path.display()
                        );
                    }
                }
            }
        }
    };
    Ok((receiver, following.boxed()))
}

/// Finds out whose key a request has, for whoever comes behind.
pub async fn identify(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let holder = state
        .keys
        .as_ref()
        .zip(presented(request.headers()))
        .and_then(|(keys, key)| keys.borrow().holder(key));
    if let Some(holder) = holder {
        tracing::debug!(key.name = %holder.name, "a key was used");
        request.extensions_mut().insert(holder);
    }
    next.run(request).await
}

/// Refuses what the key of a request does not allow (401, 403). Without `API_KEYS_FILE` everything is allowed.
pub async fn authorize(State(state): State<AppState>, request: Request, next: Next) -> Response {
    if state.keys.is_none() {
        return next.run(request).await;
    }
    let needed = router::role(&request);
    match request.extensions().get::<Holder>() {
        None => unauthorized(presented(request.headers()).is_some()),
        Some(holder) if holder.role < needed => forbidden(needed),
        Some(_) => next.run(request).await,
    }
}

/// What stands in `X-API-Key`, else in `Authorization: Bearer`.
fn presented(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(key) = headers.get("x-api-key") {
        return Some(key.as_bytes());
    }
    let authorization = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = authorization.split_at_checked("Bearer ".len())?;
    scheme
        .eq_ignore_ascii_case(b"Bearer ")
        .then(|| key.trim_ascii())
}

fn unauthorized(has_key: bool) -> Response {
    let message = if has_key {
        "the key is not valid"
    } else {
        "a key is needed: send it as `X-API-Key` or `Authorization: Bearer`"
    };
    let error = ApiError::new(StatusCode::UNAUTHORIZED, Code::Unauthorized, message);
    let mut response = error.into_response();
    response.headers_mut().insert(
        header::WWW_AUTHENTICATE,
        HeaderValue::from_static("Bearer realm=\"birb-nest\""),
    );
    response
}

fn forbidden(needed: Role) -> Response {
    ApiError::new(
        StatusCode::FORBIDDEN,
        Code::Forbidden,
        format!("this needs a key with the role `{needed}`"),
    )
    .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    const READER: &str = "0123456789abcdef";
    const ADMIN: &str = "fedcba9876543210-and-more";

    #[test]
    fn keys_have_roles() {
        let keys = Keyring::parse(&format!(
            "# keys\n\nread dashboards {READER}\n  admin\toperators   {ADMIN}\n"
        ))
        .expect("valid");
        let role = |key: &str| keys.holder(key.as_bytes()).map(|holder| holder.role);
        assert_eq!(role(READER), Some(Role::Read));
        assert_eq!(role(ADMIN), Some(Role::Admin));
        for wrong in [
            "",
            "0",
            &READER[1..],
            "0123456789abcdef0",
            "0123456789ABCDEF",
        ] {
            assert_eq!(role(wrong), None, "{wrong}");
        }
        assert!(Role::Read < Role::Write && Role::Write < Role::Admin);
    }

    #[test]
    fn a_key_that_differs_anywhere_is_none() {
        let keys = Keyring::parse(&format!("read a {READER}\nadmin b {ADMIN}")).expect("valid");
        for key in [READER, ADMIN] {
            assert!(keys.holder(key.as_bytes()).is_some());
            for n in 0..key.len() {
                assert!(keys.holder(&key.as_bytes()[..n]).is_none(), "{n} bytes");
                assert!(keys.holder(&key.as_bytes()[n + 1..]).is_none());
                for bit in 0..8 {
                    let mut other = key.as_bytes().to_vec();
                    other[n] ^= 1 << bit;
                    assert!(keys.holder(&other).is_none(), "bit {bit} of byte {n}");
                }
            }
            for more in ["\0", " ", "0", READER, ADMIN] {
                let longer = format!("{key}{more}");
                assert!(keys.holder(longer.as_bytes()).is_none(), "{longer:?}");
            }
        }
    }

    #[test]
    fn digests_are_compared_to_the_last_byte() {
        let digest = Digest::of(b"key");
        assert!(digest.is(&Digest::of(b"key")));
        for n in 0..32 {
            let mut other = Digest::of(b"key");
            other.0[n] ^= 1;
            assert!(!digest.is(&other), "byte {n}");
        }
    }

    #[test]
    fn a_line_that_is_wrong_is_named_and_no_key_is_said() {
        for (text, line) in [
            (format!("read a {READER}\nread b"), "line 2"),
            (format!("root a {READER}"), "line 1"),
            ("read a short".to_owned(), "line 1"),
            (format!("read a {READER}ä"), "line 1"),
            (format!("read a {READER}\nwrite a {ADMIN}"), "line 2"),
            (format!("read a {READER}\nwrite b {READER}"), "line 2"),
            (format!("read a {READER} x"), "line 1"),
            ("# nothing\n".to_owned(), "no keys"),
        ] {
            let error = Keyring::parse(&text).expect_err(&text).to_string();
            assert!(error.contains(line), "{text}: {error}");
            for secret in [READER, "short"] {
                assert!(!error.contains(secret), "{error}");
            }
        }
    }

    #[test]
    fn where_a_key_stands() {
        let headers = |lines: &[(&'static str, &'static str)]| -> HeaderMap {
            lines
                .iter()
                .map(|(name, value)| {
                    (
                        axum::http::HeaderName::from_static(name),
                        HeaderValue::from_static(value),
                    )
                })
                .collect()
        };
        for (lines, expected) in [
            (&[("x-api-key", "k")][..], Some(&b"k"[..])),
            (&[("authorization", "Bearer k")], Some(b"k")),
            (&[("authorization", "bearer  k")], Some(b"k")),
            (&[("authorization", "Basic k")], None),
            (&[("authorization", "Bear")], None),
            (&[], None),
            (
                &[("authorization", "Bearer b"), ("x-api-key", "a")],
                Some(b"a"),
            ),
        ] {
            assert_eq!(presented(&headers(lines)), expected, "{lines:?}");
        }
    }
}
