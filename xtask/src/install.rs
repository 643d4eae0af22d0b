//! Herd installed in a local cluster, which `up` and the end-to-end tests begin with.

use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result, anyhow};

use crate::herd_cluster::{HerdCluster, output};
use crate::images::{self, Image};
use crate::kubectl::Kubectl;
use crate::lock::Lock;
use crate::models;
use crate::paths::Paths;
use crate::progress;
use crate::prometheus;
use crate::release::{self, Helm};

/// What there is afterwards.
#[derive(Debug)]
pub(crate) struct Installed {
    pub(crate) kubectl: Kubectl,
    pub(crate) kubeconfig: PathBuf,
    pub(crate) grpcurl: PathBuf,
    pub(crate) helm: PathBuf,
}

/// The folder of a cluster.
pub(crate) fn cluster_folder(paths: &Paths, name: &str) -> PathBuf {
    paths.cache.join("clusters").join(name)
}

/// A cluster, the images in it, and the chart's release: whatever of them is not there already. The cluster starts while the
/// images are made.
pub(crate) fn install(paths: &Paths, name: &str, lock: &Lock) -> Result<Installed> {
    let program = HerdCluster::build(paths)?;
    let (cluster, images) = thread::scope(|scope| {
        let cluster = scope.spawn(|| start(&program, name));
        let images = images::make(paths, &[models::BF16, models::FP8]);
        (cluster.join(), images)
    });
    let cluster = cluster.map_err(|_| anyhow!("the thread that starts the cluster panicked"))?;
    let (tools, images) = match (cluster, images) {
        (Ok(tools), Ok(images)) => (tools, images),
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => return Err(error),
        (Err(cluster), Err(images)) => return Err(anyhow!("{cluster:#}\n{images:#}")),
    };
    let Tools { helm, grpcurl, prometheus } = tools;
    let prometheus = images::tool_image(paths, "prometheus", &prometheus)?;
    load(&program, name, images.all().chain([&prometheus]))?;
    let folder = cluster_folder(paths, name);
    let kubectl = Kubectl::of(&folder);
    prometheus::install(&kubectl, &prometheus)?;
    let release = Helm::new(helm.clone(), &folder);
    release::install(paths, &release, &kubectl, &images, lock)?;
    Ok(Installed { kubectl, kubeconfig: folder.join("kubeconfig"), grpcurl, helm })
}

/// Removes a cluster and all it owns; it is no error that there is none.
pub(crate) fn remove(paths: &Paths, name: &str) -> Result<String> {
    output(HerdCluster::build(paths)?.command(&["down", "--name", name])?)
}

/// Removes a cluster when dropped.
#[derive(Debug)]
pub(crate) struct Down<'a> {
    pub(crate) paths: &'a Paths,
    pub(crate) name: &'a str,
}

impl Drop for Down<'_> {
    fn drop(&mut self) {
        let Self { paths, name } = self;
        if let Err(error) = remove(paths, name) {
            eprintln!("failed to take down {name}: {error:#}");
        }
    }
}

/// Programs for what runs in a cluster and beside it.
struct Tools {
    helm: PathBuf,
    grpcurl: PathBuf,
    prometheus: PathBuf,
}

/// Starts the cluster. All builds come first, since they would keep a starting cluster waiting.
fn start(program: &HerdCluster, name: &str) -> Result<Tools> {
    progress::quietly("cluster", |_| {
        let tools = Tools {
            helm: program.tool("helm")?,
            grpcurl: program.tool("grpcurl")?,
            prometheus: program.tool("prometheus")?,
        };
        output(program.command_with_tools(&["up", "--name", name])?)
            .context("failed to start the cluster")?;
        Ok(tools)
    })
}

fn load<'a>(program: &HerdCluster, name: &str, images: impl Iterator<Item = &'a Image>) -> Result<()> {
    progress::step("images", |_| {
        for image in images {
            let mut load = program.command(&["image", "load", "--name", name])?;
            load.arg(&image.layout);
            output(load).with_context(|| format!("failed to load {}", image.reference))?;
        }
        Ok(((), "loaded".to_owned()))
    })
}
