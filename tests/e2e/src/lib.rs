//! What both rings share: an operator that runs as its ServiceAccount, and ways to look at a namespace.

mod audit;
mod install;
mod look;
mod operator;
mod proxy;

pub use audit::{Request, requests, requests_with};
pub use install::{Installation, install, install_for};
pub use look::{PATIENCE, client, condition, eventually, names_of, told};
pub use operator::{Operator, forbidden, nothing_forbidden};
pub use proxy::{Fault, Hit, Proxy, THROUGH_PROXY};
