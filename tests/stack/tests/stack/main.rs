//! The stack itself, against the real servers: what its documentation promises.

mod clients;
mod leftovers;
mod proxies;
mod servers;
