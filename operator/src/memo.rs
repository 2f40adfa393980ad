//! What was applied last, so that an object which still is as it was left costs no request.
//!
//! It is kept in memory alone: a process that has just begun to lead applies everything once. And it is not believed for
//! ever: from time to time a pass applies all of a nest again, whatever is remembered.

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::render::{Child, Kind};

/// What was applied of all nests, by uid.
#[derive(Default)]
pub struct Memo(Mutex<HashMap<String, Remembered>>);

/// What was applied of one nest.
#[derive(Default)]
struct Remembered {
    children: HashMap<(Kind, String), Applied>,
    /// When everything is to be applied again. None before the first whole pass.
    renewal: Option<Instant>,
    /// Everything is applied in this pass.
    is_ignored: bool,
    /// Uids of objects that were told of.
    told: HashSet<String>,
}

struct Applied {
    desired: u64,
    resource_version: Option<String>,
}

impl Memo {
    /// A pass over the nest begins at `now`. If its renewal is due, nothing that is remembered counts until
    /// [`Memo::finish`].
    pub fn begin(&self, nest: &str, now: Instant) {
        let mut nests = self.lock();
        let remembered = nests.entry(nest.to_owned()).or_default();
        remembered.is_ignored = remembered.renewal.is_some_and(|renewal| now >= renewal);
    }

    /// A pass over the nest has come to its end at `now`. The next renewal is `resync` later, unless one is due earlier;
    /// returns how long until then.
    pub fn finish(&self, nest: &str, resync: Duration, now: Instant) -> Duration {
        let mut nests = self.lock();
        let remembered = nests.entry(nest.to_owned()).or_default();
        if remembered.is_ignored {
            remembered.renewal = None;
            remembered.is_ignored = false;
        }
        let renewal = *remembered.renewal.get_or_insert(now + resync);
        renewal.saturating_duration_since(now)
    }

    /// Whether `child` was applied to the object that now has this `resource_version`, and nothing has changed since, in
    /// the object or in what is wanted of it.
    pub fn stands(&self, nest: &str, child: &Child, resource_version: Option<&str>) -> bool {
        let nests = self.lock();
        let Some(remembered) = nests.get(nest).filter(|nest| !nest.is_ignored) else {
            return false;
        };
        remembered
            .applied(child)
            .is_some_and(|applied| applied.left_as(child, resource_version))
    }

    /// Notes that `child` was applied: the object had the resource version `before`, if there was one, and has `after`.
    /// Returns whether that put back what somebody else had changed or deleted.
    pub fn note(
        &self,
        nest: &str,
        child: &Child,
        before: Option<&str>,
        after: Option<&str>,
    ) -> bool {
        let mut nests = self.lock();
        let remembered = nests.entry(nest.to_owned()).or_default();
        let applied = Applied {
            desired: digest(child),
            resource_version: after.map(str::to_owned),
        };
        let was_same = remembered
            .applied(child)
            .is_some_and(|earlier| earlier.desired == applied.desired);
        let key = (child.kind, child.name.clone());
        remembered.children.insert(key, applied);
        was_same && before != after
    }

    /// Whether the object with this uid, which is to be told of, has not been yet.
    pub fn is_first_time(&self, nest: &str, uid: String) -> bool {
        let mut nests = self.lock();
        nests.entry(nest.to_owned()).or_default().told.insert(uid)
    }

    /// Forgets this nest.
    pub fn forget(&self, nest: &str) {
        self.lock().remove(nest);
    }

    /// Forgets all nests but these.
    pub fn keep(&self, nests: &HashSet<String>) {
        self.lock().retain(|nest, _| nests.contains(nest));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Remembered>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Remembered {
    fn applied(&self, child: &Child) -> Option<&Applied> {
        self.children.get(&(child.kind, child.name.clone()))
    }
}

impl Applied {
    fn left_as(&self, child: &Child, resource_version: Option<&str>) -> bool {
        self.resource_version.is_some()
            && self.resource_version.as_deref() == resource_version
            && self.desired == digest(child)
    }
}

/// Only ever compared within this process.
fn digest(child: &Child) -> u64 {
    let mut hasher = DefaultHasher::new();
    child.object.to_string().hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const RESYNC: Duration = Duration::from_secs(600);

    fn child(replicas: u32) -> Child {
        Child {
            kind: Kind::Deployment,
            name: "cache-api".to_owned(),
            object: json!({ "spec": { "replicas": replicas } }),
        }
    }

    #[test]
    fn only_what_was_left_as_it_is_stands() {
        let memo = Memo::default();
        memo.begin("nest", Instant::now());
        assert!(!memo.stands("nest", &child(2), Some("5")));
        memo.note("nest", &child(2), None, Some("5"));
        assert!(memo.stands("nest", &child(2), Some("5")));
        assert!(!memo.stands("nest", &child(2), Some("6")), "edited");
        assert!(!memo.stands("nest", &child(2), None), "deleted");
        assert!(!memo.stands("nest", &child(3), Some("5")), "wanted anew");
        assert!(!memo.stands("other", &child(2), Some("5")));
        memo.forget("nest");
        assert!(!memo.stands("nest", &child(2), Some("5")));
    }

    #[test]
    fn drift_is_told_from_change_and_from_echo() {
        let memo = Memo::default();
        assert!(!memo.note("nest", &child(2), None, Some("5")), "made");
        assert!(
            !memo.note("nest", &child(3), Some("5"), Some("6")),
            "changed"
        );
        assert!(
            !memo.note("nest", &child(3), Some("8"), Some("8")),
            "its status"
        );
        assert!(
            memo.note("nest", &child(3), Some("9"), Some("10")),
            "edited"
        );
        assert!(memo.note("nest", &child(3), None, Some("12")), "deleted");
    }

    #[test]
    fn everything_is_applied_again_from_time_to_time() {
        let memo = Memo::default();
        let start = Instant::now();
        memo.begin("nest", start);
        memo.note("nest", &child(2), None, Some("5"));
        assert_eq!(memo.finish("nest", RESYNC, start), RESYNC);

        let half = start + RESYNC / 2;
        memo.begin("nest", half);
        assert!(memo.stands("nest", &child(2), Some("5")));
        // Passes in between do not put it off.
        assert_eq!(memo.finish("nest", RESYNC, half), RESYNC / 2);

        let due = start + RESYNC;
        memo.begin("nest", due);
        assert!(!memo.stands("nest", &child(2), Some("5")));
        // That pass failed; the next one makes up for it.
        memo.begin("nest", due);
        assert!(!memo.stands("nest", &child(2), Some("5")));
        assert_eq!(memo.finish("nest", RESYNC, due), RESYNC);
        memo.begin("nest", due);
        assert!(memo.stands("nest", &child(2), Some("5")));
    }

    #[test]
    fn nests_that_are_gone_leave_nothing_behind() {
        let memo = Memo::default();
        memo.begin("one", Instant::now());
        memo.begin("two", Instant::now());
        memo.keep(&HashSet::from(["two".to_owned()]));
        assert_eq!(memo.lock().len(), 1);
    }
}
