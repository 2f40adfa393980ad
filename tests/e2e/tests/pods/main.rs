//! The pod ring: the operator as an administrator installs it, and nests whose pods run on a node.

mod backup;
mod external;
mod managed;
mod scaling;
mod servers;
mod sleep;
mod world;
