//! What the machine must have: root, and Debian packages, which are installed where they are missing.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail, ensure};

use crate::progress::{self, Activity};
use crate::step::{run, run_watched};

/// How one sees that a package is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Probe {
    /// A program of the path.
    Program(&'static str),
    File(&'static str),
    PythonModule(&'static str),
}

/// What is used, and the Debian package it is in.
const NEEDS: [(Probe, &str); 11] = [
    (Probe::Program("runc"), "runc"),
    (Probe::File("/usr/lib/cni/ptp"), "containernetworking-plugins"),
    (Probe::File("/usr/lib/cni/portmap"), "containernetworking-plugins"),
    (Probe::File("/usr/lib/cni/host-local"), "containernetworking-plugins"),
    (Probe::Program("iptables"), "iptables"),
    (Probe::Program("conntrack"), "conntrack"),
    (Probe::Program("ip"), "iproute2"),
    (Probe::Program("nsenter"), "util-linux"),
    (Probe::Program("strip"), "binutils"),
    (Probe::Program("python3"), "python3"),
    (Probe::PythonModule("pip"), "python3-pip"),
];

/// Where `apt-get update` leaves what it learned.
const LISTS: &str = "/var/lib/apt/lists";

/// Whether this process may make namespaces, links and cgroups.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Why nothing that needs a cluster can run here, if so.
pub(crate) fn obstacle() -> Option<String> {
    if !is_root() {
        return Some("a cluster is made of namespaces, links and cgroups: it needs root".to_owned());
    }
    match missing(is_there) {
        none if none.is_empty() => None,
        packages => {
            Some(format!("missing Debian packages: {}; cargo xtask up installs them", packages.join(" ")))
        }
    }
}

/// Installs what is missing, after saying so.
pub(crate) fn prepare() -> Result<()> {
    ensure!(is_root(), "a cluster is made of namespaces, links and cgroups: run this as root");
    let packages = missing(is_there);
    // The images' base layer is made of downloaded packages.
    let lists_are_there = fs::read_dir(LISTS).is_ok_and(|mut lists| {
        lists.any(|list| list.is_ok_and(|list| list.file_name().to_string_lossy().contains("_Packages")))
    });
    if packages.is_empty() && lists_are_there {
        return Ok(());
    }
    if !is_debian(&fs::read_to_string("/etc/os-release").unwrap_or_default()) {
        bail!("this is no Debian: install what its packages {} hold, and try again", packages.join(" "));
    }
    if !packages.is_empty() {
        println!("Installs these Debian packages: {}", packages.join(" "));
    }
    progress::step("Debian packages", |activity| {
        apt_get(&["update", "--quiet"], activity)?;
        if packages.is_empty() {
            return Ok(((), "lists fetched".to_owned()));
        }
        let mut install = vec!["install", "--yes", "--quiet", "--no-install-recommends"];
        install.extend(&packages);
        apt_get(&install, activity)?;
        Ok(((), "installed".to_owned()))
    })?;
    let packages = missing(is_there);
    ensure!(
        packages.is_empty(),
        "apt-get installed {}, and what they should hold is not there",
        packages.join(" ")
    );
    Ok(())
}

/// The path, and where Debian has programs for root, which a plain `su` leaves out.
pub(crate) fn path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    for folder in ["/usr/sbin", "/sbin"].map(PathBuf::from) {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

fn apt_get(arguments: &[&str], activity: &Activity) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    command.env("PATH", std::env::join_paths(path())?);
    let (success, output) = run_watched(command, |line| activity.set(line));
    ensure!(success, "{}", output.trim_end());
    Ok(())
}

/// Packages of which something is not there, each once.
fn missing(is_there: impl Fn(Probe) -> bool) -> Vec<&'static str> {
    let mut packages = Vec::new();
    for (probe, package) in NEEDS {
        if !packages.contains(&package) && !is_there(probe) {
            packages.push(package);
        }
    }
    packages
}

fn is_there(probe: Probe) -> bool {
    match probe {
        Probe::Program(name) => path().iter().any(|folder| folder.join(name).is_file()),
        Probe::File(path) => Path::new(path).is_file(),
        Probe::PythonModule(name) => {
            let mut python = Command::new("python3");
            python.args(["-c", &format!("import {name}")]);
            run(python).0
        }
    }
}

/// Whether `/etc/os-release` says that this is Debian or descends from it.
fn is_debian(os_release: &str) -> bool {
    os_release.lines().any(|line| {
        line.strip_prefix("ID=")
            .or(line.strip_prefix("ID_LIKE="))
            .is_some_and(|value| value.trim_matches('"').split_whitespace().any(|word| word == "debian"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_named_once_and_only_if_something_of_it_is_missing() {
        assert_eq!(missing(|_| true), Vec::<&str>::new());
        let no_cni = |probe| !matches!(probe, Probe::File(path) if path.starts_with("/usr/lib/cni"));
        assert_eq!(missing(no_cni), ["containernetworking-plugins"]);
        let one_plugin_missing = |probe| probe != Probe::File("/usr/lib/cni/host-local");
        assert_eq!(missing(one_plugin_missing), ["containernetworking-plugins"]);
        assert_eq!(missing(|probe| !matches!(probe, Probe::PythonModule(_))), ["python3-pip"]);
        assert_eq!(missing(|_| false).len(), 9);
    }

    #[test]
    fn knows_debian_and_what_descends_from_it() {
        assert!(is_debian("PRETTY_NAME=\"Debian GNU/Linux 12\"\nID=debian\n"));
        assert!(is_debian("ID=ubuntu\nID_LIKE=\"debian\"\n"));
        assert!(!is_debian("ID=fedora\nID_LIKE=\"rhel centos\"\n"));
        assert!(!is_debian("VERSION_ID=debian\n"));
        assert!(!is_debian(""));
    }
}
