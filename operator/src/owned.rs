//! The objects of all nests as their watches last saw them.

use std::{collections::HashMap, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use kube::{
    api::{DynamicObject, ObjectMeta},
    runtime::reflector::{ObjectRef, Store, store},
};

use crate::{
    render::{CONTROLLER, Kind, MANAGED_BY_LABEL, UID_LABEL},
    resolve::Nest,
};

/// Objects that carry the operator's label, by kind; those of kinds without a status that matters by their metadata alone,
/// the others without their pod templates.
/// It may lag behind what was just written.
pub struct Owned(HashMap<Kind, Store<DynamicObject>>);

impl Owned {
    /// Nothing yet, and for each kind what fills it.
    pub fn new() -> (Self, Vec<(Kind, store::Writer<DynamicObject>)>) {
        // Secrets are never applied, so it does not matter what they were like.
        let kinds = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Secret);
        let writers: Vec<_> = kinds
            .map(|kind| (kind, store::Writer::new(kind.api_resource())))
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

    /// What says of itself that it is an object of the nest, of this kind.
    pub fn of(&self, nest: &Nest, kind: Kind) -> Vec<Arc<DynamicObject>> {
        self.0
            .get(&kind)
            .map(|store| store.state_filter(|object| says_it_is_of(nest, &object.metadata)))
            .unwrap_or_default()
    }
}

/// By its owner; or, where somebody took that away and it has no other, by its labels.
fn says_it_is_of(nest: &Nest, metadata: &ObjectMeta) -> bool {
    let owners = || metadata.owner_references.iter().flatten();
    let has_label = |name: &str, value: &str| {
        let labels = metadata.labels.as_ref();
        labels
            .and_then(|labels| labels.get(name))
            .map(String::as_str)
            == Some(value)
    };
    owners().any(|owner| owner.uid == nest.uid)
        || (!owners().any(|owner| owner.controller == Some(true))
            && has_label(MANAGED_BY_LABEL, CONTROLLER)
            && has_label(UID_LABEL, &nest.uid))
}

/// Who wrote an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// The operator, for the nest.
    Operator,
    /// Somebody else, or the operator for another nest.
    Other,
    /// Somebody cleared its field managers.
    Unknown,
}

/// Who wrote an object with this `metadata`, which was just read whole: owner and labels come along when somebody copies an
/// object, its field managers do not.
pub fn writer(nest: &Nest, metadata: &ObjectMeta) -> Writer {
    let managers = metadata.managed_fields.as_deref().unwrap_or_default();
    let is_ours = |entry: &ManagedFieldsEntry| {
        entry.manager.as_deref() == Some(CONTROLLER) && entry.operation.as_deref() == Some("Apply")
    };
    if !says_it_is_of(nest, metadata) {
        Writer::Other
    } else if managers.is_empty() {
        Writer::Unknown
    } else if managers.iter().any(is_ours) {
        Writer::Operator
    } else {
        Writer::Other
    }
}
