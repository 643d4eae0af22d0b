//! `herd serve`: the same model without a cluster, which says what the answers have to be.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// For a small model to load.
const READY_WITHIN: Duration = Duration::from_mins(2);

/// A running `herd serve`, which ends with this.
#[derive(Debug)]
pub struct Serve {
    child: Child,
    grpc: String,
}

impl Serve {
    /// On free ports, as soon as it can be asked.
    pub fn start(herd: &Path, model: &Path, name: &str, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(herd);
        command.arg("serve").arg(model).args(["--name", name]).args(arguments);
        command.args(["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run {}", herd.display()))?;
        let (sender, lines) = channel();
        let stdout = child.stdout.take();
        thread::spawn(move || {
            for line in
                stdout.map(BufReader::new).into_iter().flat_map(|pipe| pipe.lines().map_while(Result::ok))
            {
                let _ = sender.send(line);
            }
        });
        let mut serve = Self { child, grpc: String::new() };
        let line = lines.recv_timeout(READY_WITHIN).context("herd serve does not say that it serves")?;
        let (_, grpc) = line.split_once("gRPC at ").with_context(|| format!("herd serve said {line:?}"))?;
        grpc.trim().clone_into(&mut serve.grpc);
        Ok(serve)
    }

    /// "host:port" of its gRPC.
    pub fn grpc(&self) -> &str {
        &self.grpc
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
