//! A browser without a window, where there is one.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// For a page to be shown, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// Milliseconds of the page's own time, which does not pass while it waits for an answer.
const PAGE_TIME: &str = "--virtual-time-budget=3000";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    Light,
    Dark,
}

pub(crate) struct Chromium {
    program: PathBuf,
    profile: tempfile::TempDir,
}

impl Chromium {
    /// `HERD_CHROMIUM`, or the first on the `PATH`. Without one the test says that it is skipped.
    pub(crate) fn find() -> Option<Self> {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let names = ["chromium", "chromium-browser", "google-chrome"];
        let found = std::env::var_os("HERD_CHROMIUM").map(PathBuf::from).or_else(|| {
            std::env::split_paths(&paths)
                .flat_map(|folder| names.map(|name| folder.join(name)))
                .find(|path| path.is_file())
        });
        if found.is_none() {
            println!("skipped: no Chromium on the PATH");
        }
        Some(Self { program: found?, profile: tempfile::tempdir().unwrap() })
    }

    async fn run(&self, arguments: &[String]) -> String {
        let mut command = Command::new(&self.program);
        command.args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]);
        command.args(["--hide-scrollbars", "--no-first-run", "--disable-extensions", PAGE_TIME]);
        command.arg(format!("--user-data-dir={}", self.profile.path().display()));
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("Chromium did not end");
        let output = output.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The page's elements, as its script has left them.
    pub(crate) async fn dom(&self, url: &str, width: u32) -> String {
        self.run(&[format!("--window-size={width},900"), "--dump-dom".to_owned(), url.to_owned()]).await
    }

    /// A picture of it.
    pub(crate) async fn screenshot(&self, url: &str, (width, height): (u32, u32), scheme: Scheme, to: &Path) {
        // 0 is dark, 1 is light.
        let scheme = u8::from(scheme == Scheme::Light);
        self.run(&[
            format!("--window-size={width},{height}"),
            format!("--blink-settings=preferredColorScheme={scheme}"),
            format!("--screenshot={}", to.display()),
            url.to_owned(),
        ])
        .await;
    }
}
