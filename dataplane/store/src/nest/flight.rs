//! One lookup per key and process at a time, shared by all who wait for it.
//!
//! A read joins only a lookup that starts after the read arrived: one that is under way may have passed a store before
//! a write was acknowledged that this reader knows of. So there is at most one flight running per key, and one waiting
//! for it to land, which everybody who arrives meanwhile shares.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use birb_nest_core::Key;
use futures::{FutureExt, future::Shared};
use tokio::sync::oneshot;

/// Who is on which flight.
pub(super) struct Flights<T>(Arc<Mutex<HashMap<Key, Slot<T>>>>);

/// A key whose flight is running; perhaps another waits.
struct Slot<T> {
    waiting: Option<Flight<T>>,
}

struct Flight<T> {
    land: oneshot::Sender<T>,
    landed: Shared<oneshot::Receiver<T>>,
}

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Clone> Flight<T> {
    fn new() -> Self {
        let (land, landed) = oneshot::channel();
        Self {
            land,
            landed: landed.shared(),
        }
    }
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    /// The result of a `look_up` of `key` that starts after this call; `None` if it panicked.
    ///
    /// # Cancel safety
    /// Safe: the lookup goes on for the others.
    pub async fn join<F>(&self, key: &Key, look_up: impl Fn() -> F + Send + 'static) -> Option<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let landed = {
            let mut slots = lock(&self.0);
            match slots.get_mut(key) {
                Some(slot) => slot.waiting.get_or_insert_with(Flight::new).landed.clone(),
                None => {
                    slots.insert(key.clone(), Slot { waiting: None });
                    let flight = Flight::new();
                    let landed = flight.landed.clone();
                    let slot = OpenSlot {
                        flights: self.0.clone(),
                        key: key.clone(),
                    };
                    tokio::spawn(slot.fly(flight, look_up));
                    landed
                }
            }
        };
        landed.await.ok()
    }
}

/// The task that flies for one key; closes the slot when it ends, however it ends.
struct OpenSlot<T> {
    flights: Arc<Mutex<HashMap<Key, Slot<T>>>>,
    key: Key,
}

impl<T: Clone> OpenSlot<T> {
    async fn fly<F: Future<Output = T>>(self, first: Flight<T>, look_up: impl Fn() -> F) {
        let mut flight = first;
        loop {
            let result = look_up().await;
            // Nobody may be left to hear it.
            let _ = flight.land.send(result);
            let mut slots = lock(&self.flights);
            match slots
                .get_mut(&self.key)
                .and_then(|slot| slot.waiting.take())
            {
                Some(next) => flight = next,
                None => {
                    slots.remove(&self.key);
                    return;
                }
            }
        }
    }
}

impl<T> Drop for OpenSlot<T> {
    fn drop(&mut self) {
        // Normally gone already. After a panic, whoever waits learns that nothing will land.
        if std::thread::panicking() {
            lock(&self.flights).remove(&self.key);
        }
    }
}

fn lock<T>(slots: &Mutex<HashMap<Key, Slot<T>>>) -> MutexGuard<'_, HashMap<Key, Slot<T>>> {
    slots.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Semaphore;

    use super::*;

    fn key() -> Key {
        Key::parse("k").expect("a key")
    }

    #[tokio::test]
    async fn a_read_joins_only_a_lookup_that_starts_after_it_arrived() {
        let flights: Arc<Flights<usize>> = Arc::default();
        let (started, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let look_up = {
            let (started, gate) = (started.clone(), gate.clone());
            move || {
                let (started, gate) = (started.clone(), gate.clone());
                async move {
                    let n = started.fetch_add(1, Ordering::SeqCst) + 1;
                    gate.acquire().await.expect("open").forget();
                    n
                }
            }
        };
        let join = || {
            let (flights, look_up) = (flights.clone(), look_up.clone());
            tokio::spawn(async move { flights.join(&key(), look_up).await })
        };
        let first = join();
        while started.load(Ordering::SeqCst) < 1 {
            tokio::task::yield_now().await;
        }
        let late: Vec<_> = (0..10).map(|_| join()).collect();
        while lock(&flights.0)
            .get(&key())
            .is_none_or(|slot| slot.waiting.is_none())
        {
            tokio::task::yield_now().await;
        }
        gate.add_permits(1);
        assert_eq!(first.await.expect("no panic"), Some(1));
        gate.add_permits(10);
        for reader in late {
            let flight = reader.await.expect("no panic").expect("landed");
            assert!(flight >= 2, "joined the flight that was under way");
        }
        assert!(started.load(Ordering::SeqCst) < 11, "nothing was shared");
        while !lock(&flights.0).is_empty() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_panic_ends_the_flight_and_not_the_key() {
        let flights: Flights<usize> = Flights::default();
        let crash = || async { panic!("in a lookup") };
        assert_eq!(flights.join(&key(), crash).await, None);
        assert_eq!(flights.join(&key(), || async { 1 }).await, Some(1));
    }
}
