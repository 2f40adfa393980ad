//! Which nests read which Secrets, so that a change of a Secret costs one look-up, however many nests and Secrets there are.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use kube::{ResourceExt, runtime::reflector::ObjectRef};

use crate::{api::BirbNest, config::Images, render::secret_keys, resolve::resolve};

/// The nests there are, by the Secrets that they name.
#[derive(Default)]
pub struct Readers(Mutex<Index>);

#[derive(Default)]
struct Index {
    /// By namespace and name.
    by_secret: HashMap<(String, String), HashSet<ObjectRef<BirbNest>>>,
    secrets: HashMap<ObjectRef<BirbNest>, HashSet<String>>,
}

impl Readers {
    /// Notes which Secrets `nest` names now.
    pub fn learn(&self, nest: &BirbNest, images: &Images) {
        let keys = secret_keys(&resolve(nest, images, &images.release));
        let secrets: HashSet<String> = keys.into_iter().map(|key| key.name).collect();
        let namespace = nest.namespace().unwrap_or_default();
        let nest = ObjectRef::from_obj(nest);
        let mut index = self.lock();
        index.forget(&nest);
        for secret in &secrets {
            let key = (namespace.clone(), secret.clone());
            index.by_secret.entry(key).or_default().insert(nest.clone());
        }
        index.secrets.insert(nest, secrets);
    }

    /// `nest` is gone.
    pub fn forget(&self, nest: &BirbNest) {
        self.lock().forget(&ObjectRef::from_obj(nest));
    }

    /// Forgets all nests but these.
    pub fn keep(&self, nests: &HashSet<ObjectRef<BirbNest>>) {
        let mut index = self.lock();
        let gone: Vec<_> = index.secrets.keys().cloned().collect();
        for nest in gone.iter().filter(|nest| !nests.contains(nest)) {
            index.forget(nest);
        }
    }

    /// The nests that name this Secret.
    pub fn of(&self, namespace: &str, secret: &str) -> HashSet<ObjectRef<BirbNest>> {
        let key = (namespace.to_owned(), secret.to_owned());
        self.lock().by_secret.get(&key).cloned().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Index {
    fn forget(&mut self, nest: &ObjectRef<BirbNest>) {
        let namespace = nest.namespace.clone().unwrap_or_default();
        for secret in self.secrets.remove(nest).unwrap_or_default() {
            let key = (namespace.clone(), secret);
            if let Some(nests) = self.by_secret.get_mut(&key) {
                nests.remove(nest);
                if nests.is_empty() {
                    self.by_secret.remove(&key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{config::Config, testing};

    fn nest(name: &str, secret: &str) -> BirbNest {
        let spec =
            format!("postgres: {{external: {{urlSecretRef: {{name: {secret}, key: url}}}}}}");
        let mut nest = testing::stored(&spec);
        nest.metadata.name = Some(name.to_owned());
        nest
    }

    fn names(readers: &Readers, secret: &str) -> Vec<String> {
        let found = readers.of("shop", secret).into_iter();
        let mut names: Vec<String> = found.map(|nest| nest.name).collect();
        names.sort();
        names
    }

    #[test]
    fn a_secret_knows_its_readers_as_they_are_now() {
        let readers = Readers::default();
        let images = Config::parse_from(["birb-nest-operator"]).images;
        readers.learn(&nest("one", "servers"), &images);
        readers.learn(&nest("two", "servers"), &images);
        assert_eq!(names(&readers, "servers"), ["one", "two"]);
        assert!(readers.of("elsewhere", "servers").is_empty());
        // What is generated for a managed server is read, too.
        assert_eq!(names(&readers, "one-redis"), ["one"]);

        readers.learn(&nest("two", "others"), &images);
        assert_eq!(names(&readers, "servers"), ["one"]);
        assert_eq!(names(&readers, "others"), ["two"]);

        readers.keep(&HashSet::from([ObjectRef::from_obj(&nest(
            "two", "others",
        ))]));
        assert!(names(&readers, "servers").is_empty());
        readers.forget(&nest("two", "others"));
        let index = readers.lock();
        assert!(index.by_secret.is_empty() && index.secrets.is_empty());
    }
}
