//! `kubectl`, as users run it.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{Deadline, Finished, run};

/// For one request; the API server answers within milliseconds, a busy machine within seconds.
const WITHIN: Duration = Duration::from_mins(1);

/// `kubectl`, in a namespace.
#[derive(Clone, Debug)]
pub struct Kubectl {
    program: PathBuf,
    namespace: String,
}

impl Kubectl {
    /// In the namespace `default`.
    pub fn new(program: PathBuf) -> Self {
        Self { program, namespace: "default".to_owned() }
    }

    /// In another namespace.
    #[must_use]
    pub fn within(&self, namespace: &str) -> Self {
        Self { program: self.program.clone(), namespace: namespace.to_owned() }
    }

    /// Where this one looks.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Runs it, and gives back whatever became of it.
    pub fn finish(&self, arguments: &[&str], input: &str) -> Result<Finished> {
        run(self.command().args(arguments), input, WITHIN)
            .with_context(|| format!("kubectl {}", arguments.join(" ")))
    }

    /// The output of a success.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        self.finish(arguments, "")?.checked().with_context(|| format!("kubectl {}", arguments.join(" ")))
    }

    /// `kubectl apply` of an object.
    pub fn apply(&self, object: &Value) -> Result<()> {
        let applied = self.finish(&["apply", "--filename=-"], &object.to_string())?.checked();
        applied.with_context(|| format!("apply {object}")).map(drop)
    }

    /// Why `kubectl apply` does not take an object.
    pub fn refusal(&self, object: &Value) -> Result<String> {
        let Finished { success, out, err } = self.finish(&["apply", "--filename=-"], &object.to_string())?;
        if success {
            bail!("{object} was taken: {out}");
        }
        Ok(err)
    }

    /// One object: "llamapool/NAME".
    pub fn get(&self, object: &str) -> Result<Value> {
        let text = self.run(&["get", object, "--output=json"])?;
        serde_json::from_str(&text).with_context(|| format!("{object} is no JSON: {text}"))
    }

    /// All objects of some kinds that a selector finds; an empty one finds all.
    pub fn list(&self, kinds: &str, selector: &str) -> Result<Vec<Value>> {
        let selector = format!("--selector={selector}");
        let text = self.run(&["get", kinds, &selector, "--output=json"])?;
        let mut list: Value =
            serde_json::from_str(&text).with_context(|| format!("{kinds}: no JSON: {text}"))?;
        match list["items"].take() {
            Value::Array(items) => Ok(items),
            _ => bail!("{kinds}: no list: {text}"),
        }
    }

    /// Watches one object, which need not be there yet, until `check` gives `Ok`; its last error says what was seen.
    pub fn watch<T>(
        &self,
        object: &str,
        within: Duration,
        mut check: impl FnMut(&Value) -> Result<T>,
    ) -> Result<T> {
        let deadline = Deadline::after(within);
        let mut last = anyhow::anyhow!("it is not there");
        while !deadline.is_over() {
            let watching = Watching::start(self.command().args(["get", object, "--watch", "--output=json"]))?;
            while let Ok(seen) = watching.objects.recv_timeout(deadline.left()) {
                match check(&seen) {
                    Ok(value) => return Ok(value),
                    Err(error) => last = error,
                }
            }
            // It was not there, or the API server ended the watch.
            deadline.pause();
        }
        bail!("waited {} s for {object} in {}; last: {last:#}", within.as_secs(), self.namespace)
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["--namespace", &self.namespace]);
        command
    }
}

/// A running `kubectl get --watch`, which ends with this.
struct Watching {
    child: Child,
    objects: Receiver<Value>,
}

impl Watching {
    fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().context("cannot run kubectl")?;
        let (sender, objects) = channel();
        let stdout = child.stdout.take();
        thread::spawn(move || {
            let lines =
                stdout.map(BufReader::new).into_iter().flat_map(|pipe| pipe.lines().map_while(Result::ok));
            for object in objects_of(lines) {
                if sender.send(object).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, objects })
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One after another, each indented, so that only its last line is a lone brace.
fn objects_of(lines: impl Iterator<Item = String>) -> impl Iterator<Item = Value> {
    let mut text = String::new();
    lines.filter_map(move |line| {
        text.push_str(&line);
        if line != "}" {
            return None;
        }
        serde_json::from_str(&std::mem::take(&mut text)).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_objects_one_after_another() {
        let text = "{\n  \"a\": {\n    \"b\": 1\n  }\n}\n{\n  \"a\": 2\n}\n{\n  \"cut";
        let objects: Vec<Value> = objects_of(text.lines().map(str::to_owned)).collect();
        assert_eq!(objects, [serde_json::json!({"a": {"b": 1}}), serde_json::json!({"a": 2})]);
    }
}
