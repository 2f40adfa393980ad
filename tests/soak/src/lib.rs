//! Clients, faults, and a judge that does not trust the code.
//!
//! A **run** is a stack of servers of its own with two APIs and two workers, and some **rounds** on it, all drawn from a seed.
//! In a round several clients work on a few fresh keys through both APIs and write down what they asked and what they were
//! answered ([`history`]), and leave others behind ([`cold`]); meanwhile a fault comes and goes ([`faults`], [`site`]). Then
//! everything is healed and drained, and the round is judged ([`judge`]): each key's history by a linearizability checker, plain
//! reads by promise 2, labels and failures by what was wrong when they came ([`calm`], [`late`]), and the stores by the history and by
//! each other ([`stores`]).
//! docs/CONSISTENCY.md has the promises.

pub mod calm;
pub mod client;
pub mod cold;
pub mod faults;
pub mod history;
pub mod judge;
pub mod late;
pub mod run;
pub mod site;
pub mod stores;
pub mod takeover;

pub use faults::Fault;
pub use run::{Plan, Report, run};
