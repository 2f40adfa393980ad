//! When nothing is wrong, so that nothing may fail and no answer may have a label.

use std::{
    fs::File,
    io::Write,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::history::History;

/// How long after everything is served again something may still fail or have a label.
pub const GRACE: Duration = Duration::from_secs(1);
/// How often the machine is looked at.
const BEAT: Duration = Duration::from_millis(50);
/// A beat that takes so much longer is a machine that stands still: every deadline inside may pass meanwhile.
const STALL: Duration = Duration::from_millis(100);

/// The shortest deadline inside: half of `REDIS_TIMEOUT`.
const DEADLINE: Duration = Duration::from_millis(125);

/// A part of the history, in its nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// From when on.
    pub from: u64,
    /// Until when.
    pub to: u64,
}

impl Span {
    /// Whether something that went on from `call` to `end` has nothing to do with it or its aftermath.
    #[must_use]
    pub fn spares(&self, call: u64, end: u64) -> bool {
        end < self.from || call > self.end()
    }

    /// When what comes from it is over, too.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.to.saturating_add(nanoseconds(GRACE))
    }
}

/// What was wrong in a round.
#[derive(Debug, Clone, Default)]
pub struct Trouble {
    /// From when something was done to a process, a server or a link until everything was served again.
    pub fault: Option<Span>,
    /// When the machine itself stood still.
    pub stalls: Vec<Span>,
    /// When it was merely slow.
    pub late: Vec<Late>,
}

/// An API that took long to answer when asked for nothing, or Redis on the other end of its link: somebody left no processor
/// to them, or to the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Late {
    /// Which API.
    pub api: usize,
    /// When it was asked and had answered.
    pub span: Span,
}

impl Trouble {
    /// Whether nothing was wrong from `call` to `end`.
    #[must_use]
    pub fn spares(&self, call: u64, end: u64) -> bool {
        self.fault.is_none_or(|fault| fault.spares(call, end)) && self.is_awake(call, end)
    }

    /// Whether what was wrong explains that something acknowledged at `acknowledged` is not read at `read`: it was wrong then,
    /// and is not long over. Who stores has `GRACE` for what was acknowledged before.
    #[must_use]
    pub fn explains(&self, acknowledged: u64, read: u64) -> bool {
        let grace = nanoseconds(GRACE);
        let explains = |span: &Span| {
            span.from <= acknowledged.saturating_add(grace) && read <= span.end() + grace
        };
        let late = self.late.iter().map(|late| &late.span);
        let mut spans = self.fault.iter().chain(&self.stalls).chain(late);
        spans.any(explains)
    }

    /// Until when something of unknown outcome, which went on from `call` to `end`, can have happened at the latest: what was
    /// on its way when something was wrong arrives when that is over, or never.
    #[must_use]
    pub fn settles(&self, call: u64, end: u64) -> u64 {
        let spans = self.fault.iter().chain(&self.stalls);
        let met = spans.filter(|span| !span.spares(call, end));
        let latest = met.map(Span::end).max().unwrap_or(0);
        latest.max(end.saturating_add(nanoseconds(GRACE)))
    }

    /// Whether that API was late from `call` to `end`, or shortly before.
    #[must_use]
    pub fn was_late(&self, api: usize, call: u64, end: u64) -> bool {
        let mut late = self.late.iter();
        late.any(|late| late.api == api && !late.span.spares(call, end))
    }

    /// Whether it was so late just then that the shortest deadline inside was over.
    #[must_use]
    pub fn was_too_late(&self, api: usize, call: u64, end: u64) -> bool {
        let mut late = self.late.iter().filter(|late| late.api == api);
        late.any(|Late { span, .. }| {
            span.to - span.from >= nanoseconds(DEADLINE) && span.from <= end && call <= span.to
        })
    }

    /// Whether the machine did not stand still.
    #[must_use]
    pub fn is_awake(&self, call: u64, end: u64) -> bool {
        self.stalls.iter().all(|stall| stall.spares(call, end))
    }
}

/// Looks at the machine: whether a thread gets to run, and a few bytes to the disk.
pub struct Pulse {
    stop: Arc<AtomicBool>,
    stalls: Arc<Mutex<Vec<Span>>>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Begins, with a file of its own in `dir`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn start(history: &History, dir: &Path) -> Result<Self> {
        let path = dir.join(format!("pulse-{}", std::process::id()));
        let mut file = File::create(&path).context("failed to make a file for the pulse")?;
        std::fs::remove_file(&path)?;
        let (stop, stalls) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (stopped, found) = (stop.clone(), Arc::clone(&stalls));
        let history = history.clone();
        let thread = std::thread::spawn(move || {
            let found: &Mutex<Vec<Span>> = &found;
            while !stopped.load(Ordering::Relaxed) {
                let (from, began) = (history.now(), Instant::now());
                std::thread::sleep(BEAT);
                let written = file.write_all(b"beat").and_then(|()| file.sync_data());
                if written.is_err() || began.elapsed() > BEAT + STALL {
                    let to = history.now();
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    found.push(Span { from, to });
                }
            }
        });
        Ok(Self {
            stop,
            stalls,
            thread: Some(thread),
        })
    }

    /// When the machine stood still so far.
    #[must_use]
    pub fn stalls(&self) -> Vec<Span> {
        let stalls = self.stalls.lock();
        stalls.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// As the history counts.
#[must_use]
pub fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
