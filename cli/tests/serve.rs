//! The `herd serve` process, from outside.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "this is how a test fails")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// Less than requests have to end; much longer than anything here takes, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(25);

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-llama31/tiny-llama31-bf16")
}

fn herd_serve(model_dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_herd"));
    command.env_remove("RUST_LOG").arg("serve").arg(model_dir);
    command.args(["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Lines as they come; closed when the process has closed its end.
fn lines(from: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    receiver
}

fn next(lines: &Receiver<String>, with: &str) -> String {
    loop {
        let line = lines.recv_timeout(PATIENCE).expect(with);
        if line.contains(with) {
            return line;
        }
    }
}

fn terminate(process: &Child) {
    // The shell's own: the program is not on every machine.
    let kill = format!("kill -TERM {}", process.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
}

struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_second_signal_cuts_what_runs() {
    let mut serve = KillOnDrop(herd_serve(&fixture()).spawn().unwrap());
    let out = lines(serve.0.stdout.take().unwrap());
    let errors = lines(serve.0.stderr.take().unwrap());
    let serving = next(&out, "serving");
    let address = serving.split("http://").nth(1).unwrap().split("/v1").next().unwrap();
    // A request that runs: the gateway waits for a body that does not come.
    let mut client = TcpStream::connect(address).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: herd\r\nContent-Type: application/json\r\n\
                Content-Length: 10\r\nExpect: 100-continue\r\n\r\n";
    client.write_all(head.as_bytes()).unwrap();
    let mut answer = [0; 12];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 100");

    terminate(&serve.0);
    next(&errors, "a second signal cuts");
    terminate(&serve.0);
    let ended = out.recv_timeout(PATIENCE);
    assert_eq!(ended, Err(RecvTimeoutError::Disconnected), "its stdout is closed by its end");
    assert!(serve.0.wait().unwrap().success());
}

/// A copy of the fixture's folder without its weights: they are not to be looked at.
fn without_weights(tokenizer: Option<&str>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture()).unwrap() {
        let (name, path) = (entry.as_ref().unwrap().file_name(), entry.unwrap().path());
        if name != "tokenizer.json" && path.extension().is_none_or(|extension| extension != "safetensors") {
            std::fs::copy(path, dir.path().join(name)).unwrap();
        }
    }
    if let Some(tokenizer) = tokenizer {
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer).unwrap();
    }
    dir
}

#[test]
fn a_tokenizer_that_cannot_be_used_is_named_before_weights_are_loaded() {
    for (tokenizer, problem) in [(None, "no tokenizer.json"), (Some("{"), "tokenizer.json is not usable")] {
        let dir = without_weights(tokenizer);
        let ended = herd_serve(dir.path()).output().unwrap();
        assert_eq!(ended.status.code(), Some(1));
        let errors = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(errors.lines().count(), 1, "{errors}");
        assert!(errors.starts_with("error: cannot serve") && errors.contains(problem), "{errors}");
    }
}
