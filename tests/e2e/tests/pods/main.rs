//! The pod ring.
