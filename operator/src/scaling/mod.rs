//! Workers by the backlog of the log (`worker.scaling.mode: Lag`).

pub mod decide;
pub mod rate;
#[cfg(test)]
mod tests;
