//! `cargo xtask up --context`, as one runs it against a cluster that one has: without root, without Go, with a registry that
//! the nodes pull from. `cargo xtask e2e --own` runs this.

use std::env;
use std::fs;
use std::io::Read as _;
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use herd_e2e::{Finished, Kubectl, eventually, run};
use serde_json::{Value, json};

/// From nothing to an answer.
const UP: Duration = Duration::from_mins(10);
const DOWN: Duration = Duration::from_mins(5);
const LISTENS: Duration = Duration::from_secs(30);

/// Every kind that Herd, helm or a namespace leaves something of.
const KINDS: &str = "namespaces,customresourcedefinitions,clusterroles,clusterrolebindings,roles,rolebindings,\
                     serviceaccounts,deployments,replicasets,pods,services,endpointslices,poddisruptionbudgets,\
                     controllerrevisions,configmaps,secrets,leases";

/// What `cargo xtask e2e --own` has made.
struct Machine {
    folder: tempfile::TempDir,
    xtask: PathBuf,
    kubeconfig: PathBuf,
    registry: PathBuf,
    address: String,
    context: String,
    kubectl: Kubectl,
    /// Whether a user without rights can be made.
    unprivileged: bool,
}

/// A user namespace: the files stay one's own, and every right of root is gone.
const NOBODY: [&str; 4] = ["--user", "--map-user=1000", "--map-group=1000", "--"];

impl Machine {
    /// Else why the test cannot run.
    fn find() -> Result<Self, String> {
        let path = |name: &str| {
            let set = env::var_os(name).filter(|value| !value.is_empty());
            set.map(PathBuf::from).ok_or_else(|| format!("{name} is not set: cargo xtask e2e --own sets it"))
        };
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let kubeconfig = path("HERD_E2E_KUBECONFIG")?;
        let machine = Self {
            xtask: path("HERD_E2E_XTASK")?,
            registry: path("HERD_E2E_REGISTRY")?,
            address: path("HERD_E2E_REGISTRY_ADDRESS")?.display().to_string(),
            context: path("HERD_E2E_CONTEXT")?.display().to_string(),
            kubectl: Kubectl::new(folder.path().join("kubectl")),
            unprivileged: run(Command::new("unshare").args(NOBODY).arg("true"), "", LISTENS)
                .is_ok_and(|finished| finished.success),
            kubeconfig,
            folder,
        };
        let (kubectl, helm) = (path("HERD_E2E_KUBECTL")?, path("HERD_E2E_HELM")?);
        machine.tools(&kubectl, &helm).map_err(|error| format!("{error:#}"))?;
        Ok(machine)
    }

    /// A folder for the PATH with kubectl and helm, and with a `go` that tells when it is run.
    fn tools(&self, kubectl: &Path, helm: &Path) -> Result<()> {
        fs::create_dir(self.bin())?;
        symlink(kubectl, self.bin().join("kubectl"))?;
        symlink(helm, self.bin().join("helm"))?;
        let script = |path: &Path, text: String| {
            fs::write(path, text)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        };
        script(&self.bin().join("go"), format!("#!/bin/sh\ntouch '{}'\nexit 1\n", self.went().display()))?;
        let own = format!(
            "#!/bin/sh\nexec '{}' --kubeconfig '{}' \"$@\"\n",
            kubectl.display(),
            self.kubeconfig.display()
        );
        script(&self.folder.path().join("kubectl"), own)?;
        Ok(())
    }

    fn bin(&self) -> PathBuf {
        self.folder.path().join("bin")
    }

    /// There once somebody has run Go.
    fn went(&self) -> PathBuf {
        self.folder.path().join("went")
    }

    /// `cargo xtask` of somebody who is not root.
    fn xtask(&self, arguments: &[&str], within: Duration) -> Result<Finished> {
        let mut path = vec![self.bin()];
        path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        self.xtask_with(&env::join_paths(path)?, arguments, within)
    }

    fn xtask_with(&self, path: &std::ffi::OsStr, arguments: &[&str], within: Duration) -> Result<Finished> {
        let mut command = if self.unprivileged {
            let mut command = Command::new("/usr/bin/unshare");
            command.args(NOBODY).arg(&self.xtask);
            command
        } else {
            Command::new(&self.xtask)
        };
        command.args(arguments);
        command.env("PATH", path).env("KUBECONFIG", &self.kubeconfig);
        let home = self.folder.path();
        for (variable, folder) in [("CACHE", "cache"), ("CONFIG", "config"), ("DATA", "data")] {
            command.env(format!("HELM_{variable}_HOME"), home.join("helm").join(folder));
        }
        command.env("KUBECACHEDIR", home.join("kubectl-cache")).env("DOCKER_CONFIG", home.join("docker"));
        run(&mut command, "", within).with_context(|| format!("xtask {}", arguments.join(" ")))
    }

    fn up(&self) -> Result<Finished> {
        let registry = format!("{}/team/herd", self.address);
        self.xtask(&["up", "--context", &self.context, "--registry", &registry, "--insecure-registry"], UP)
    }

    fn down(&self) -> Result<String> {
        self.xtask(&["down", "--context", &self.context], DOWN)?.checked()
    }

    /// Everything in the cluster that can be left behind.
    fn objects(&self) -> Result<Vec<String>> {
        let columns = "--output=custom-columns=KIND:.kind,NAMESPACE:.metadata.namespace,NAME:.metadata.name";
        let text = self.kubectl.run(&["get", KINDS, "--all-namespaces", "--no-headers", columns])?;
        let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
        // Nodes come and go as the cluster has it.
        let mut objects: Vec<String> = words.filter(|object| !object.contains(" kube-node-lease ")).collect();
        objects.sort();
        Ok(objects)
    }
}

/// The reference registry, on the machine; it ends with this.
struct Registry(Child);

impl Registry {
    fn start(machine: &Machine) -> Result<Self> {
        let folder = machine.folder.path();
        let config = json!({
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": true}},
            "storage": {"filesystem": {"rootdirectory": folder.join("registry")}},
            "http": {"addr": machine.address},
        });
        let file = folder.join("registry.yaml");
        // JSON is YAML.
        fs::write(&file, config.to_string())?;
        let log = fs::File::create(folder.join("registry.log"))?;
        let mut command = Command::new(&machine.registry);
        command.arg("serve").arg(&file).env("OTEL_TRACES_EXPORTER", "none");
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut registry = Self(command.spawn().context("cannot run the registry")?);
        eventually("the registry", LISTENS, || {
            if let Some(status) = registry.0.try_wait()? {
                let mut log = String::new();
                fs::File::open(folder.join("registry.log"))?.read_to_string(&mut log)?;
                bail!("it ended with {status}: {log}");
            }
            Ok(TcpStream::connect(&machine.address).map(drop)?)
        })?;
        Ok(registry)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_cluster_of_ones_own_answers_and_is_left_as_it_was() -> Result<()> {
    let machine = match Machine::find() {
        Ok(machine) => machine,
        Err(why) => {
            println!("skipped: {why}");
            return Ok(());
        }
    };
    if !machine.unprivileged {
        println!("as root: this machine lets nobody make user namespaces");
    }
    let _registry = Registry::start(&machine)?;
    let before = machine.objects()?;

    refusals(&machine)?;
    ensure!(machine.objects()? == before, "a refusal changed something");

    let Finished { success, out, err } = machine.up()?;
    ensure!(success, "up failed:\n{out}\n{err}");
    ensure!(out.contains("Tokyo"), "the answer is wrong:\n{out}");
    let context = format!("context {}, https://10.", machine.context);
    for part in [context.as_str(), "namespace herd-system", "namespace default", "without TLS"] {
        ensure!(out.contains(part), "{part:?} was not said before anything was changed:\n{out}");
    }
    pulled_from_the_registry(&machine)?;

    let Finished { success, out, err } = machine.up()?;
    ensure!(success, "up failed the second time:\n{out}\n{err}");
    ensure!(out.contains("Tokyo"), "the second answer is wrong:\n{out}");
    ensure!(err.matches("there already").count() == 4, "images were pushed again:\n{err}");
    ensure!(err.contains("chart herd: cached"), "the chart was installed again:\n{err}");

    let somebody_elses = somebody_elses();
    machine.kubectl.apply(&somebody_elses)?;
    let kept = machine.down()?;
    ensure!(kept.contains("kept: the custom resources") && kept.contains("default/mine"), "{kept}");
    machine.kubectl.get("llamadeployment/mine").context("what somebody else made is gone")?;
    ensure!(machine.kubectl.get("llamadeployment/smollm2").is_err(), "the example is there yet");
    machine.kubectl.run(&["delete", "llamadeployment", "mine", "--cascade=foreground"])?;

    machine.down()?;
    let after = machine.objects()?;
    let left: Vec<_> = after.iter().filter(|object| !before.contains(object)).collect();
    let gone: Vec<_> = before.iter().filter(|object| !after.contains(object)).collect();
    ensure!(left.is_empty() && gone.is_empty(), "left: {left:?}; gone: {gone:?}");

    ensure!(machine.down()?.contains("chart herd"), "there is nothing to remove, and that is no error");
    ensure!(!machine.went().exists(), "Go was run");
    Ok(())
}

/// What is said before anything is changed.
fn refusals(machine: &Machine) -> Result<()> {
    let registry = format!("{}/team/herd", machine.address);
    let refused = |finished: Finished, parts: &[&str]| {
        ensure!(!finished.success, "it was not refused: {}", finished.out);
        for part in parts {
            ensure!(finished.err.contains(part), "{part:?} is not in {}", finished.err);
        }
        Ok(())
    };
    let nowhere = machine.xtask(&["up", "--context", "nowhere", "--registry", &registry], UP)?;
    refused(nowhere, &["no context \"nowhere\"", &machine.context])?;
    let arguments = ["up", "--context", &machine.context, "--registry", &registry];
    let without = machine.xtask_with("/nonexistent".as_ref(), &arguments, UP)?;
    refused(without, &["kubectl (how to get it: https://", "helm (how to get it: https://"])
}

/// Every image of Herd's is the one that was pushed.
fn pulled_from_the_registry(machine: &Machine) -> Result<()> {
    let from = format!("{}/team/herd/", machine.address);
    let mut seen = 0;
    for kubectl in [machine.kubectl.within("herd-system"), machine.kubectl.clone()] {
        for pod in kubectl.list("pods", "")? {
            let images = [&pod["spec"]["containers"][0]["image"]].into_iter().chain(model(&pod));
            for image in images {
                let image = image.as_str().unwrap_or_default();
                ensure!(image.starts_with(&from), "{image} is not from {from}");
                seen += 1;
            }
        }
    }
    // Operator, gateway, and two gangs with a model each.
    ensure!(seen == 6, "{seen} images");
    Ok(())
}

fn model(pod: &Value) -> Option<&Value> {
    let mut volumes = pod["spec"]["volumes"].as_array()?.iter();
    volumes.find_map(|volume| Some(&volume["image"]["reference"]).filter(|image| image.is_string()))
}

/// A fleet that `up` has not made; nodes have no place for it.
fn somebody_elses() -> Value {
    json!({
        "apiVersion": "herd.dev/v1alpha1",
        "kind": "LlamaDeployment",
        "metadata": {"name": "mine", "namespace": "default"},
        "spec": {
            "model": {"source": "oci://lk.local/none:1"},
            "parallelism": {"tensor": 3},
            "prefill": {"minReplicas": 1, "maxReplicas": 1},
            "decode": {"minReplicas": 1, "maxReplicas": 1},
        },
    })
}
