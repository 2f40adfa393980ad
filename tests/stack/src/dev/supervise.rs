//! Starts again what died, and says so: people will kill servers to see what happens.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use anyhow::Result;
use birb_nest_stack::{Environment, Process, Role, Server};
use tokio::time::sleep;

use super::say;

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Before a server is started again, and before the first new attempt of a role.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A worker may have a batch in hand.
const TERMINATE_LIMIT: Duration = Duration::from_secs(30);

/// Starts the server again a second after it died, as often as needed.
pub(crate) async fn watch_server(server: &Server) -> Result<Infallible> {
    let name = server.name();
    loop {
        sleep(LOOK_EVERY).await;
        let Some(status) = server.exited()? else {
            continue;
        };
        say(&format!(
            "{name} died ({status}); the last lines of {}:",
            server.log_file().display()
        ));
        for line in server.last_lines(5).lines() {
            println!("{name:<6} | {line}");
        }
        say(&format!("starting {name} again in {PAUSE:?}"));
        sleep(PAUSE).await;
        match server.start().await {
            Ok(()) => say(&format!("{name} runs again")),
            Err(error) => say(&format!("{error:#}")),
        }
    }
}

/// The API or the worker.
pub(crate) struct Supervised<'a> {
    role: Role,
    environment: &'a Environment,
    process: Option<Process>,
}

impl<'a> Supervised<'a> {
    pub(crate) fn new(role: Role, environment: &'a Environment) -> Self {
        Self {
            role,
            environment,
            process: None,
        }
    }

    pub(crate) fn name(&self) -> String {
        self.role.to_string()
    }

    /// Returns when it is ready.
    pub(crate) async fn start(&mut self) -> Result<()> {
        self.process = Some(self.environment.start(self.role).await?);
        Ok(())
    }

    pub(crate) async fn stop(self) -> Result<()> {
        if let Some(process) = self.process {
            process.terminate(TERMINATE_LIMIT).await?;
        }
        Ok(())
    }

    /// Starts the role again whenever it ends, after longer and longer pauses if it never lives long. Its last words are among
    /// the followed logs already.
    pub(crate) async fn watch(&mut self) -> Result<Infallible> {
        let mut pause = PAUSE;
        loop {
            let started = Instant::now();
            if let Some(process) = &self.process {
                let status = process.wait().await?;
                say(&format!(
                    "{} ended ({status}); starting it again in {pause:?}",
                    self.role
                ));
            }
            let lived_long = started.elapsed() > 3 * LONGEST_PAUSE;
            sleep(pause).await;
            pause = if lived_long {
                PAUSE
            } else {
                LONGEST_PAUSE.min(pause * 2)
            };
            self.process = Some(self.environment.spawn(self.role)?);
        }
    }
}
