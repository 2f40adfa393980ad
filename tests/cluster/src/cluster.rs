//! A cluster to test against: a person's, or our own.

use std::env;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use birb_nest_stack::{Port, Root, blocking};

use crate::certificates::Certificates;
use crate::control_plane::{self, Listen};
use crate::kubectl::{Kubectl, write_kubeconfig};
use crate::programs::Programs;
use crate::site::Site;
use crate::{control_groups, node};

/// Names the kubeconfig of a cluster to use instead of our own, wherever that is.
const GIVEN: &str = "BIRBNEST_TEST_KUBECONFIG";
/// Names one, too, for tests that need pods, if its API server is on this machine, as those of kind, k3d and minikube are.
/// Many have it set to clusters that are no place for tests.
const USUAL: &str = "KUBECONFIG";

/// How much of Kubernetes runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The API server with its store, and the controllers for garbage, namespaces and service accounts.
    ControlPlane,
    /// That, all controllers, the scheduler, and a node.
    Pods,
}

impl Extent {
    /// Whether this machine and this user can run it, as far as that can be told before anything is built.
    ///
    /// # Errors
    /// Not root, or a package is missing.
    pub fn require(self) -> Result<()> {
        match self {
            Self::ControlPlane => Ok(()),
            Self::Pods => node::require(),
        }
    }
}

/// A running Kubernetes. Dropped, what was started for it is killed and removed.
#[derive(Debug)]
pub struct Cluster {
    kubectl: Kubectl,
    server_url: String,
    ca_certificate: Vec<u8>,
    own: Option<Own>,
}

/// What was started by us, in the order in which it is to be taken down.
#[derive(Debug)]
struct Own {
    audit_log: PathBuf,
    site: Site,
    _ports: Vec<Port>,
    _root: Root,
}

impl Cluster {
    /// The given cluster; else a control plane of our own: etcd, an API server and the controllers that delete dependents,
    /// empty namespaces and make tokens. Takes seconds once its programs are built, and needs no root.
    ///
    /// `KUBEBUILDER_ASSETS` names other programs for it; without a kube-controller-manager among them
    /// [`Cluster::collects_garbage`] is false.
    ///
    /// # Errors
    /// Go is missing, the programs cannot be built, or one of them does not start; with the end of its log.
    /// # Cancel safety
    /// Dropping the future kills what was started.
    pub async fn control_plane() -> Result<Self> {
        Self::temporary(Extent::ControlPlane).await
    }

    /// The given cluster; else the whole of our own: a node that runs pods, with service addresses, names and volumes.
    ///
    /// # Errors
    /// Those of [`Cluster::control_plane`]; not root, or a package is missing.
    /// # Cancel safety
    /// Dropping the future kills what was started.
    pub async fn pods() -> Result<Self> {
        Self::temporary(Extent::Pods).await
    }

    async fn temporary(extent: Extent) -> Result<Self> {
        let named = |name| env::var_os(name).filter(|path| !path.is_empty());
        if let Some(kubeconfig) = named(GIVEN) {
            return Self::given(GIVEN, kubeconfig.into()).await;
        }
        if let (Extent::Pods, Some(kubeconfig)) = (extent, named(USUAL)) {
            let kubectl = Self::kubectl_of(kubeconfig.clone().into()).await?;
            match kubectl.server().await {
                Ok((url, _)) if is_here(&url) => {
                    return Self::given(USUAL, kubeconfig.into()).await;
                }
                Ok((url, _)) => eprintln!(
                    "{USUAL} leads to {url}, which is not on this machine: left alone; {GIVEN} uses it all the same"
                ),
                Err(error) => eprintln!("{USUAL} is passed over: {error:#}"),
            }
        }
        let root = blocking(|| Root::temporary("clusters", control_groups::remove)).await?;
        Self::start(root, extent).await
    }

    /// A cluster of our own in `dir`, which is empty or missing; its files stay when it is dropped.
    ///
    /// # Errors
    /// Those of [`Cluster::pods`]; another one runs in `dir`.
    /// # Cancel safety
    /// Dropping the future kills what was started.
    pub async fn kept(dir: &Path, extent: Extent) -> Result<Self> {
        let dir = dir.to_owned();
        let root = blocking(move || Root::kept(&dir, control_groups::remove)).await?;
        Self::start(root, extent).await
    }

    async fn kubectl_of(kubeconfig: PathBuf) -> Result<Kubectl> {
        let on_path = || {
            env::split_paths(&env::var_os("PATH")?)
                .map(|dir| dir.join("kubectl"))
                .find(|program| program.is_file())
        };
        let program = match on_path() {
            Some(program) => program,
            None => blocking(Programs::build).await?.path("kubectl")?,
        };
        Ok(Kubectl {
            program,
            kubeconfig,
        })
    }

    async fn given(variable: &str, kubeconfig: PathBuf) -> Result<Self> {
        let kubectl = Self::kubectl_of(kubeconfig).await?;
        kubectl
            .run(&["get", "--raw=/readyz", "--request-timeout=30s"])
            .await
            .with_context(|| {
                format!(
                    "the cluster of {variable}={} does not answer",
                    kubectl.kubeconfig.display()
                )
            })?;
        let (server_url, ca_certificate) = kubectl.server().await?;
        Ok(Self {
            kubectl,
            server_url,
            ca_certificate,
            own: None,
        })
    }

    async fn start(root: Root, extent: Extent) -> Result<Self> {
        extent.require()?;
        let programs = match (extent, Programs::assets()) {
            (Extent::ControlPlane, Some(assets)) => assets,
            _ => blocking(Programs::build).await?,
        };
        let port = Port::reserve()?;
        let server_url = format!("https://127.0.0.1:{}", port.number());
        let certificates = Certificates::make(&root.path().join("certificates"))?;
        let ca_certificate = std::fs::read(&certificates.authority)?;
        let kubectl = Kubectl {
            program: programs.path("kubectl")?,
            kubeconfig: root.path().join("kubeconfig"),
        };
        write_kubeconfig(
            &kubectl.kubeconfig,
            &server_url,
            &certificates.authority,
            &certificates.admin,
        )?;
        let mut site = Site::new(root.path(), programs, certificates, kubectl.clone());
        let ports = match extent {
            Extent::ControlPlane => start_control_plane(&mut site, port).await?,
            Extent::Pods => start_pods(&mut site, port).await?,
        };
        Ok(Self {
            kubectl,
            server_url,
            ca_certificate,
            own: Some(Own {
                audit_log: control_plane::audit_log(root.path()),
                site,
                _ports: ports,
                _root: root,
            }),
        })
    }

    /// The administrator's kubeconfig, for use on the host.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubectl.kubeconfig
    }

    /// False for a given cluster: touch nothing there but namespaces of your own.
    pub fn is_ours(&self) -> bool {
        self.own.is_some()
    }

    /// Whether dependents of a deleted object, and deleted namespaces, go away.
    pub fn collects_garbage(&self) -> bool {
        let own = self.own.as_ref();
        own.is_none_or(|own| has_controllers(&own.site))
    }

    /// `https://HOST:PORT` of the API server, as the host reaches it.
    pub fn server_url(&self) -> &str {
        &self.server_url
    }

    /// PEM of the authority that signed the API server's certificate; empty if the given kubeconfig names none.
    pub fn ca_certificate(&self) -> &[u8] {
        &self.ca_certificate
    }

    /// Pods that connect to this address reach the same TCP port of the host's 127.0.0.1. `None`: there is no such way.
    pub fn host_address(&self) -> Option<IpAddr> {
        self.own.as_ref()?.site.node?;
        Some(node::HOST_ADDRESS.parse().expect("it is an address"))
    }

    /// JSON lines, one for each request to the API server: who, what, and the answer. `None` for a given cluster.
    pub fn audit_log(&self) -> Option<&Path> {
        Some(&self.own.as_ref()?.audit_log)
    }

    /// Gives the node images, from archives as `docker save` and `buildah push` write them. Does nothing to a given cluster:
    /// there the images are its owner's matter.
    ///
    /// # Errors
    /// There is no node, or an archive is none.
    pub async fn load_images(&self, archives: &[PathBuf]) -> Result<()> {
        let Some(own) = &self.own else {
            return Ok(());
        };
        for archive in archives {
            load_image(&own.site.root, archive).await?;
        }
        Ok(())
    }

    /// Runs kubectl as administrator and returns what it printed; `input` is for its `--filename=-`.
    ///
    /// # Errors
    /// It failed; with what it said.
    /// # Cancel safety
    /// Dropping the future kills it.
    pub async fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String> {
        self.kubectl.run_with(arguments, input).await
    }

    /// What a person would look at first when something in `namespace` does not work: objects, events, pods' logs.
    pub async fn diagnose(&self, namespace: &str) -> String {
        let namespace = format!("--namespace={namespace}");
        let ask = async |arguments: &[&str]| {
            let answer = self.kubectl.run(&[arguments, &[&namespace]].concat()).await;
            answer.unwrap_or_else(|error| format!("{error:#}\n"))
        };
        let mut report = String::new();
        for arguments in [
            &[
                "get",
                "all,persistentvolumeclaims,configmaps,secrets",
                "--output=wide",
            ] as &[&str],
            &["get", "events", "--sort-by=.metadata.creationTimestamp"],
            &["describe", "pods"],
        ] {
            report += &format!(
                "--- kubectl {}\n{}",
                arguments.join(" "),
                ask(arguments).await
            );
        }
        for pod in ask(&["get", "pods", "--output=name"]).await.lines() {
            let logs = ["logs", pod, "--all-containers", "--prefix", "--tail=40"];
            report += &format!("--- {pod}: logs\n{}", ask(&logs).await);
        }
        report
    }
}

/// On the host; `port` is the API server's. Returns all ports that it uses.
async fn start_control_plane(site: &mut Site, port: Port) -> Result<Vec<Port>> {
    let [etcd, etcd_peer] = [Port::reserve()?, Port::reserve()?];
    let listen = Listen {
        etcd: etcd.number(),
        etcd_peer: etcd_peer.number(),
        api_server: port.number(),
        node_address: None,
    };
    control_plane::start(site, listen)?;
    control_plane::ready(site).await?;
    if has_controllers(site) {
        let kubeconfig = site.kubectl.kubeconfig.clone();
        control_plane::start_controllers(site, &kubeconfig, false)?;
        control_plane::controllers_ready(site).await?;
    }
    Ok(vec![port, etcd, etcd_peer])
}

/// In a node; `port` of the host leads to the API server inside.
async fn start_pods(site: &mut Site, port: Port) -> Result<Vec<Port>> {
    node::enter(site).await?;
    let listen = Listen {
        etcd: 2379,
        etcd_peer: 2380,
        api_server: node::API_SERVER_PORT,
        node_address: Some(node::ADDRESS),
    };
    control_plane::start(site, listen)?;
    node::start_tunnels(site, port.number())?;
    node::start_runtime(site).await?;
    control_plane::ready(site).await?;
    node::start(site)?;
    control_plane::controllers_ready(site).await?;
    node::ready(site).await?;
    Ok(vec![port])
}

/// The programs of `KUBEBUILDER_ASSETS` do not include them.
fn has_controllers(site: &Site) -> bool {
    site.programs.path("kube-controller-manager").is_ok()
}

/// Gives the node of the cluster that another process keeps in `dir` an image.
///
/// # Errors
/// Those of [`Cluster::load_images`].
pub async fn load_image(dir: &Path, archive: &Path) -> Result<()> {
    let socket = node::containerd_socket(dir);
    if !socket.exists() {
        bail!(
            "the cluster in {} has no node, so it takes no images",
            dir.display()
        );
    }
    node::load_image(&socket, archive).await
}

/// Removes what a killed cluster left behind in `dir`, and the directory.
///
/// # Errors
/// A cluster runs there, or something cannot be removed.
pub fn remove(dir: &Path) -> Result<()> {
    let root = Root::kept(dir, control_groups::remove)?;
    std::fs::remove_dir_all(root.path())
        .with_context(|| format!("failed to remove {}", root.path().display()))
}

/// Whether the server with this address is on this machine.
fn is_here(url: &str) -> bool {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest);
    let host = authority
        .rsplit_once(':')
        .map_or(authority, |(host, _)| host);
    ["127.0.0.1", "localhost", "[::1]"].contains(&host.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::is_here;

    #[test]
    fn only_what_is_on_this_machine_is_taken_without_being_named() {
        for url in [
            "https://127.0.0.1:6443",
            "https://localhost:6443",
            "https://[::1]:6443",
        ] {
            assert!(is_here(url), "{url}");
        }
        for url in [
            "https://10.0.0.1:6443",
            "https://prod.example.com",
            "https://127.0.0.1.evil.example.com:443",
        ] {
            assert!(!is_here(url), "{url}");
        }
    }
}
