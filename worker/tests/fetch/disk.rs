//! A disk without room: a file system of a megabyte, which only root can mount.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::hub::Hub;
use crate::model::{Node, WEIGHT_BYTES, from_hub, is_whole, pin, state};

struct Mounted(PathBuf);

impl Mounted {
    fn new(on: &Path, bytes: usize) -> Option<Self> {
        let size = format!("size={bytes}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(on).output();
        mount.is_ok_and(|mount| mount.status.success()).then(|| Self(on.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_disk_without_room_is_told_before_anything_is_downloaded() {
    let node = Node::new();
    let Some(_mounted) = Mounted::new(node.root(), WEIGHT_BYTES) else {
        println!("skipped: a tmpfs cannot be mounted here");
        return;
    };
    let hub = Hub::start(state()).await;
    let source = from_hub(&hub, None);
    let pin = pin(&source).await;
    let error = node.fetch(source, &pin).await.unwrap_err();
    assert_eq!(error.reason(), "DiskFull");
    let said = error.to_string();
    assert!(said.contains("hf://herd/tiny needs 600.0 kB more") && said.contains("free"), "{said}");
    assert!(hub.content.seen().is_empty());
}

#[tokio::test]
async fn a_disk_that_fills_up_in_the_middle_is_told() {
    let node = Node::new();
    let Some(_mounted) = Mounted::new(node.root(), 3 * WEIGHT_BYTES) else {
        println!("skipped: a tmpfs cannot be mounted here");
        return;
    };
    let hub = Hub::start(state()).await;
    let source = from_hub(&hub, None);
    let pin = pin(&source).await;
    let filler = node.root().join("filler");
    let fills = filler.clone();
    // After there was room.
    hub.state.lock().unwrap().before = Some(Box::new(move |name| {
        if !name.ends_with(".safetensors") {
            return;
        }
        let _ = fs::write(&fills, vec![0; 2 * WEIGHT_BYTES + WEIGHT_BYTES / 2]);
    }));
    let error = node.fetch(source.clone(), &pin).await.unwrap_err();
    assert_eq!(error.reason(), "DiskFull", "{error}");
    assert!(error.to_string().contains("hf://herd/tiny needs"), "{error}");
    // Once there is room it goes on.
    hub.state.lock().unwrap().before = None;
    fs::remove_file(filler).unwrap();
    node.fetch(source.clone(), &pin).await.unwrap();
    is_whole(&node.model(&source, &pin), 1);
}
