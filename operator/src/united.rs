//! Watches of several namespaces as if they were one.

use std::collections::HashMap;

use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use kube::{
    Resource, ResourceExt,
    runtime::watcher::{self, Event},
};

/// All that `watches` tell, each of another namespace, as one watch tells it. What one of them has listed is told though
/// another has not listed anything yet, or fails.
///
/// A listing replaces all that was known; so when one watch lists anew, what is known of the others is told again.
pub fn united<'a, K>(
    mut watches: Vec<BoxStream<'a, watcher::Result<Event<K>>>>,
) -> BoxStream<'a, watcher::Result<Event<K>>>
where
    K: Resource + Clone + Send + 'a,
{
    if let [_] = watches[..] {
        return watches.remove(0);
    }
    let mut union = Union::new(watches.len());
    let numbered = watches
        .into_iter()
        .enumerate()
        .map(|(number, watch)| watch.map(move |event| (number, event)));
    stream::select_all(numbered.collect::<Vec<_>>())
        .flat_map(move |(number, event)| {
            let events: Vec<_> = match event {
                Ok(event) => union.tell(number, event).into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            };
            stream::iter(events)
        })
        .boxed()
}

/// What is known, by watch and name.
struct Union<K>(Vec<Known<K>>);

struct Known<K> {
    objects: HashMap<String, K>,
    listing: HashMap<String, K>,
}

impl<K: Resource + Clone> Union<K> {
    fn new(n_watches: usize) -> Self {
        let nothing = || Known {
            objects: HashMap::new(),
            listing: HashMap::new(),
        };
        Self(std::iter::repeat_with(nothing).take(n_watches).collect())
    }

    fn tell(&mut self, watch: usize, event: Event<K>) -> Vec<Event<K>> {
        let known = &mut self.0[watch];
        match event {
            Event::Init => {
                known.listing.clear();
                Vec::new()
            }
            Event::InitApply(object) => {
                known.listing.insert(object.name_any(), object);
                Vec::new()
            }
            Event::InitDone => {
                known.objects = std::mem::take(&mut known.listing);
                let all = self.0.iter().flat_map(|known| known.objects.values());
                let mut events = vec![Event::Init];
                events.extend(all.cloned().map(Event::InitApply));
                events.push(Event::InitDone);
                events
            }
            Event::Apply(object) => {
                known.objects.insert(object.name_any(), object.clone());
                vec![Event::Apply(object)]
            }
            Event::Delete(object) => {
                known.objects.remove(&object.name_any());
                vec![Event::Delete(object)]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::runtime::reflector::{self, ObjectRef};
    use proptest::prelude::*;

    use super::*;

    fn object(namespace: usize, name: u8) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.namespace = Some(format!("n{namespace}"));
        object.metadata.name = Some(name.to_string());
        object
    }

    /// What a watch may do: list some objects, tell of one, or of the end of one.
    #[derive(Clone, Debug)]
    enum Step {
        List(BTreeSet<u8>),
        Apply(u8),
        Delete(u8),
    }

    fn any_step() -> impl Strategy<Value = (usize, Step)> {
        let step = prop_oneof![
            proptest::collection::btree_set(0..5u8, 0..4).prop_map(Step::List),
            (0..5u8).prop_map(Step::Apply),
            (0..5u8).prop_map(Step::Delete),
        ];
        (0..3usize, step)
    }

    proptest! {
        /// A store that is filled by the union has what stores of the single watches would have.
        #[test]
        fn a_union_knows_what_its_watches_know(steps in proptest::collection::vec(any_step(), 0..40)) {
            let (store, mut writer) = reflector::store();
            let mut union = Union::new(3);
            let mut expected = BTreeSet::new();
            for (watch, step) in steps {
                let events = match step {
                    Step::List(names) => {
                        expected.retain(|(other, _)| *other != watch);
                        expected.extend(names.iter().map(|name| (watch, *name)));
                        let listed = names.into_iter().map(|name| Event::InitApply(object(watch, name)));
                        [Event::Init].into_iter().chain(listed).chain([Event::InitDone]).collect()
                    }
                    Step::Apply(name) => {
                        expected.insert((watch, name));
                        vec![Event::Apply(object(watch, name))]
                    }
                    Step::Delete(name) => {
                        expected.remove(&(watch, name));
                        vec![Event::Delete(object(watch, name))]
                    }
                };
                for event in events.into_iter().flat_map(|event| union.tell(watch, event)) {
                    writer.apply_watcher_event(&event);
                }
            }
            let known: BTreeSet<_> = store.state().iter().map(|object| ObjectRef::from_obj(object.as_ref()).to_string()).collect();
            let expected: BTreeSet<_> = expected.into_iter().map(|(watch, name)| ObjectRef::from_obj(&object(watch, name)).to_string()).collect();
            prop_assert_eq!(known, expected);
        }
    }
}
