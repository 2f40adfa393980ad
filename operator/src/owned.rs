//! The objects of all nests as their watches last saw them.

use std::{collections::HashMap, sync::Arc};

use kube::{
    ResourceExt,
    api::DynamicObject,
    runtime::reflector::{ObjectRef, Store, store::Writer},
};

use crate::{render::Kind, resolve::Nest};

/// Objects that carry the operator's label, by kind; those of kinds without a status that matters by their metadata alone,
/// the others without their pod templates.
/// It may lag behind what was just written.
pub struct Owned(HashMap<Kind, Store<DynamicObject>>);

impl Owned {
    /// Nothing yet, and for each kind what fills it.
    pub fn new() -> (Self, Vec<(Kind, Writer<DynamicObject>)>) {
        // Secrets are never applied, so it does not matter what they were like.
        let kinds = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Secret);
        let writers: Vec<_> = kinds
            .map(|kind| (kind, Writer::new(kind.api_resource())))
            .collect();
        let stores = writers
            .iter()
            .map(|(kind, writer)| (*kind, writer.as_reader()));
        (Self(stores.collect()), writers)
    }

    /// The object of this kind and name in the nest's namespace.
    pub fn get(&self, nest: &Nest, kind: Kind, name: &str) -> Option<Arc<DynamicObject>> {
        let reference = ObjectRef::new_with(name, kind.api_resource()).within(&nest.namespace);
        self.0.get(&kind)?.get(&reference)
    }

    /// The nest's objects of this kind.
    pub fn of(&self, nest: &Nest, kind: Kind) -> Vec<Arc<DynamicObject>> {
        let is_of_nest = |object: &DynamicObject| {
            let mut owners = object.owner_references().iter();
            owners.any(|owner| owner.uid == nest.uid)
        };
        self.0
            .get(&kind)
            .map(|store| store.state_filter(is_of_nest))
            .unwrap_or_default()
    }
}
