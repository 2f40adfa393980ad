//! Kubernetes' programs: built once from the Go module beside this crate, and kept by the hash of what they are made of.

use std::env;
use std::fs::{self, File, TryLockError};
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Without these the node and `kubectl version` report no version at all, and helm takes every cluster it cannot ask for 1.20.
const LINKER_FLAGS: &str = "-s -w \
    -X k8s.io/component-base/version.gitVersion=v1.34.4 \
    -X k8s.io/component-base/version.gitMajor=1 \
    -X k8s.io/component-base/version.gitMinor=34 \
    -X helm.sh/helm/v3/internal/version.version=v3.19.0 \
    -X helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor=1 \
    -X helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor=34 \
    -X helm.sh/helm/v3/pkg/lint/rules.k8sVersionMajor=1 \
    -X helm.sh/helm/v3/pkg/lint/rules.k8sVersionMinor=34";

/// What is built: the multi-call program, the workload of the harness' image, helm.
const PACKAGES: [&str; 3] = [".", "./pod", "helm.sh/helm/v3/cmd/helm"];

/// The image whose only program is `pod`; nobody can pull it, it is imported.
pub(crate) const IMAGE: &str = "birb-nest.test/pod:1";

/// How often a build that takes minutes says that it goes on.
const PROGRESS: Duration = Duration::from_secs(15);

/// A directory with kube-apiserver, etcd, kubectl, and if it is ours all the others.
#[derive(Clone, Debug)]
pub struct Programs {
    dir: PathBuf,
}

impl Programs {
    /// Those of `KUBEBUILDER_ASSETS`, if it is set: a control plane without controllers.
    pub(crate) fn assets() -> Option<Self> {
        let dir = env::var_os("KUBEBUILDER_ASSETS").filter(|dir| !dir.is_empty())?;
        Some(Self { dir: dir.into() })
    }

    /// Our own; builds them if that was not done before, which takes minutes and says so on stderr. Several callers, in
    /// this process or others, build once.
    ///
    /// # Errors
    /// Go is missing, or the build failed; with what the compiler said.
    pub fn build() -> Result<Self> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("go");
        let go = go()?;
        let cache = cache()?;
        let key = key(&go, &source)?;
        let dir = cache.join(&key);
        let programs = Self { dir };
        if programs.dir.is_dir() {
            return Ok(programs);
        }
        let lock_path = cache.join(key.clone() + ".lock");
        let lock = File::create(&lock_path)
            .with_context(|| format!("failed to create {}", lock_path.display()))?;
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            say("another process builds Kubernetes' programs: waiting for it");
            lock.lock()?;
        }
        if programs.dir.is_dir() {
            return Ok(programs);
        }
        let unfinished = cache.join(key + ".unfinished");
        fs::create_dir_all(&unfinished)?;
        compile(&go, &source, &unfinished)?;
        finish(&unfinished)?;
        fs::rename(&unfinished, &programs.dir)?;
        say(&format!(
            "built Kubernetes' programs into {}",
            programs.dir.display()
        ));
        Ok(programs)
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The program of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn path(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if !path.is_file() {
            bail!("there is no {name} in {}", self.dir.display());
        }
        Ok(path)
    }

    /// The archive of [`IMAGE`].
    pub(crate) fn image(&self) -> PathBuf {
        self.dir.join("pod.tar")
    }
}

fn go() -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain([PathBuf::from("/usr/local/go/bin")])
        .map(|dir| dir.join("go"))
        .find(|go| go.is_file())
        .context("Go not found: the test cluster is built with it; install Go 1.25 or newer")
}

fn cache() -> Result<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME")
        .filter(|base| !base.is_empty())
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cache")))
        .context(
            "neither HOME nor XDG_CACHE_HOME is set: the test cluster's programs are kept there",
        )?;
    let cache = base.join("birb-nest/cluster");
    fs::create_dir_all(&cache).with_context(|| format!("failed to create {}", cache.display()))?;
    Ok(cache)
}

/// Stands for all that the programs are made of: sources, dependencies (go.sum), flags, compiler.
fn key(go: &Path, source: &Path) -> Result<String> {
    let version = Command::new(go)
        .arg("version")
        .current_dir(source)
        .output()
        .with_context(|| format!("failed to run {}", go.display()))?;
    let mut inputs = version.stdout;
    inputs.extend(LINKER_FLAGS.bytes());
    for dir in [source, &source.join("pod")] {
        let mut files: Vec<PathBuf> = fs::read_dir(dir)
            .with_context(|| format!("failed to list {}", dir.display()))?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_file())
            .collect();
        files.sort();
        for file in files {
            inputs.extend(file.file_name().unwrap_or_default().as_encoded_bytes());
            inputs.extend(fs::read(&file)?);
        }
    }
    Ok(format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&inputs)))
}

fn compile(go: &Path, source: &Path, to: &Path) -> Result<()> {
    say(
        "building Kubernetes 1.34 from its Go modules, once; this takes about five minutes on two cores",
    );
    let mut compiler = Command::new(go)
        .args(["build", "-v", "-trimpath", "-ldflags", LINKER_FLAGS, "-o"])
        .arg(to)
        .args(PACKAGES)
        .env("CGO_ENABLED", "0")
        .current_dir(source)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("failed to run {}", go.display()))?;
    let output = compiler.stderr.take().expect("it was asked for");
    let (started, mut said) = (Instant::now(), Instant::now());
    let (mut n_packages, mut complaints) = (0, String::new());
    for line in BufReader::new(output).lines() {
        let line = line?;
        // One package a line; a line about a download or an error has spaces.
        if !line.contains(' ') {
            n_packages += 1;
        } else if !line.starts_with("go: downloading ") {
            complaints += &format!("{line}\n");
        }
        if said.elapsed() >= PROGRESS {
            said = Instant::now();
            let seconds = started.elapsed().as_secs();
            say(&format!("{n_packages} packages compiled after {seconds} s"));
        }
    }
    let status = compiler.wait()?;
    if !status.success() {
        bail!(
            "failed to build the test cluster's programs in {} ({status}):\n{complaints}",
            source.display()
        );
    }
    Ok(())
}

/// Gives the program all its names, and packs the image.
fn finish(dir: &Path) -> Result<()> {
    // `go build` names it after the last word of the module.
    let program = dir.join("birb-cluster");
    let names = output(Command::new(&program))?;
    for name in names.lines() {
        match symlink("birb-cluster", dir.join(name)) {
            // An earlier attempt ended after this.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            linked => linked?,
        }
    }
    let mut image = Command::new(dir.join("image"));
    image.args([IMAGE.into(), dir.join("pod"), dir.join("pod.tar")]);
    output(image)?;
    Ok(())
}

fn output(mut command: Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("failed to run {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed: {}",
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Not by `eprintln`: a test's would be shown only if the test fails.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "cluster: {text}");
}
