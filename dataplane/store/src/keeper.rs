//! Background tasks that their handle cannot do without.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Spawns tasks, stops them when it is dropped, and tells when one ended before that.
#[derive(Default)]
pub(crate) struct Keeper {
    stop: CancellationToken,
    ended: watch::Sender<Option<&'static str>>,
}

/// Tells of its task's end, however it comes: by a panic too.
struct Ends {
    name: &'static str,
    told: watch::Sender<Option<&'static str>>,
}

impl Keeper {
    /// Spawns the task called `name`, which goes on until the token is cancelled.
    pub fn spawn<F>(&self, name: &'static str, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let ends = Ends {
            name,
            told: self.ended.clone(),
        };
        let task = task(self.stop.clone());
        tokio::spawn(async move {
            let _ends = ends;
            task.await;
        });
    }

    /// Waits until a task has ended, and names it.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn failed(&self) -> &'static str {
        let mut ended = self.ended.subscribe();
        let name = ended.wait_for(Option::is_some).await.map(|name| *name);
        name.ok().flatten().expect("this keeper has a sender")
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        self.told.send_replace(Some(self.name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_told_of() {
        let keeper = Keeper::default();
        keeper.spawn("steady", |stop| async move { stop.cancelled().await });
        keeper.spawn("broken", |_| async { panic!("a defect") });
        assert_eq!(keeper.failed().await, "broken");
    }

    #[tokio::test]
    async fn tasks_end_with_their_keeper() {
        let keeper = Keeper::default();
        let mut ended = keeper.ended.subscribe();
        keeper.spawn("steady", |stop| async move { stop.cancelled().await });
        drop(keeper);
        let ended = ended.wait_for(Option::is_some).await.expect("a sender");
        assert_eq!(*ended, Some("steady"));
    }
}
