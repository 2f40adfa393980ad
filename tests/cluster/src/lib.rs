//! A real Kubernetes 1.34 for the tests, built from Go modules and run as child processes: no Docker, no registry of images.
//!
//! [`Cluster::control_plane`] is etcd, an API server and the controllers that delete what nobody owns any more: enough for an
//! operator whose children never run, as any user, in seconds. [`Cluster::pods`] is the whole, with one node that runs pods.
//!
//! ```text
//!   host                                 namespaces of their own (net, pid, mount)
//!   kubectl, operator, tests             kube-apiserver, etcd, controllers, scheduler
//!     127.0.0.1:PORT --- tunnel ------->   127.0.0.1:6443
//!     127.0.0.1:any <--- tunnel --------   10.89.0.2:any    <--- pods (kubelet, containerd, kube-proxy, CoreDNS, volumes)
//! ```
//!
//! # Guarantees
//! - No packet leaves the machine: the namespaces have no link to it but the two tunnels, which are Unix sockets.
//! - Nothing outlives the harness, even if that is killed: the node's first process dies with it, and with that process
//!   the kernel ends all others, their mounts and their network. Control groups and files are removed by the next start.
//! - Clusters share nothing, so any number runs side by side.

mod certificates;
mod cluster;
mod configs;
mod control_groups;
mod control_plane;
mod kubectl;
mod node;
mod programs;
mod site;

pub use cluster::{Cluster, Extent, load_image, remove};
pub use programs::Programs;
