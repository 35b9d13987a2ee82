//! The trust document, walked through: its commands are run as they stand there, against a running
//! server with a real agent.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use flywheel_agent::source::{self, FrameBuf, Read};
use flywheel_tests::{Background, Flywheel, wait_until};

const DOCUMENT: &str = include_str!("../../shared/TRUST.md");

/// The commands of a part of the document, as one script.
fn walk(name: &str) -> Result<&'static str> {
    let fence = format!("```sh walk:{name}\n");
    let (_, rest) = DOCUMENT
        .split_once(&fence)
        .with_context(|| format!("TRUST.md has no part `{name}`"))?;
    let (script, _) = rest.split_once("```").context("a fence without an end")?;
    Ok(script)
}

struct Place {
    flywheel: Flywheel,
    dir: tempfile::TempDir,
    walked: Vec<&'static str>,
}

impl Place {
    fn new() -> Result<Self> {
        let program = env!("CARGO_BIN_EXE_flywheel-under-test");
        let dir = tempfile::tempdir()?;
        std::fs::create_dir(dir.path().join("bin"))?;
        symlink(program, dir.path().join("bin/flywheel"))?;
        Ok(Self {
            flywheel: Flywheel::new(program),
            dir,
            walked: Vec::new(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_string_lossy().into_owned()
    }

    /// Runs a part of the document, each command as it stands there.
    fn walk(&mut self, name: &'static str, variables: &[(&str, &str)]) -> Result<String> {
        let script = walk(name)?;
        self.walked.push(name);
        let path = format!(
            "{}:{}",
            self.text("bin"),
            std::env::var("PATH").unwrap_or_default()
        );
        let output = Command::new("sh")
            .args(["-euc", script])
            .current_dir(self.dir.path())
            .env("PATH", path)
            .env_remove("FLYWHEEL_TOKEN")
            .env_remove("FLYWHEEL_SERVER")
            .envs(variables.iter().copied())
            .output()
            .context("cannot run sh")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "{name} ended with {}:\n{text}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(text)
    }

    fn json(&self, args: &[&str]) -> Result<serde_json::Value> {
        let data = self.text("cloud");
        self.flywheel.json(&[args, &["--data", &data]].concat())
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let data = self.text("cloud");
        self.flywheel.succeed(&[args, &["--data", &data]].concat())
    }

    fn serve(&self) -> Result<Background> {
        let log = self.path("server.log");
        let server = self.flywheel.start(
            &[
                "serve",
                "--data",
                &self.text("cloud"),
                "--keys",
                &self.text("server"),
                "--http-port",
                "0",
            ],
            &log,
        )?;
        wait_until("the server answers", || {
            let data = self.text("cloud");
            let output = self.flywheel.run(&["device", "ls", "--data", &data])?;
            Ok(output.status.success())
        })
        .with_context(|| std::fs::read_to_string(&log).unwrap_or_default())?;
        Ok(server)
    }

    /// A model, good or not.
    fn model(&self) -> Result<String> {
        for (seed, split, count) in [(1, "train", 60), (2, "golden", 40)] {
            let dir = self.path(split);
            pictures(&format!("sim:roads?seed={seed}&mix=balanced"), count, &dir)?;
            let dir = dir.to_string_lossy().into_owned();
            self.run(&["dataset", "import", &dir, "--split", split])?;
        }
        let dataset = self.json(&["dataset", "freeze"])?;
        let dataset = dataset["id"].as_str().context("no dataset id")?;
        let model = self.json(&["train", "--dataset", dataset, "--steps", "20"])?;
        Ok(model["id"].as_str().context("no model id")?.to_owned())
    }

    fn enroll(&self) -> Result<Background> {
        let token = self.run(&["device", "enroll", "--device", "cam1"])?;
        let address = std::fs::read_to_string(self.path("cloud/api-address"))?;
        let data = self.text("cam1");
        self.flywheel.succeed(&[
            "agent",
            "enroll",
            "--url",
            address.trim(),
            "--token",
            token.trim(),
            "--data",
            &data,
            "--device",
            "cam1",
        ])?;
        let config = self.path("cam1.toml");
        std::fs::write(
            &config,
            format!(
                "data = {data:?}\nsource = \"sim:roads?seed=3\"\npace = 20\nhealth_interval_ms = 200\n"
            ),
        )?;
        self.start()
    }

    fn start(&self) -> Result<Background> {
        let config = self.text("cam1.toml");
        let args = ["agent", "run", "--config", &config];
        self.flywheel.start(&args, &self.path("cam1.log"))
    }

    /// Waits until the device says that it has a version of the trust root.
    fn has_root(&self, version: u64) -> Result<()> {
        wait_until("the device has the new root", || {
            let device = self.json(&["device", "show", "cam1"])?;
            Ok(device["root_version"].as_u64() == Some(version))
        })
        .with_context(|| std::fs::read_to_string(self.path("cam1.log")).unwrap_or_default())
    }
}

/// Writes pictures of a source into one folder for each class.
fn pictures(uri: &str, count: u64, dir: &Path) -> Result<()> {
    let mut source = source::open(uri)?;
    let mut frame = FrameBuf::new();
    for index in (0..count).map(|at| at * 5) {
        ensure!(source.read(index, &mut frame)? == Read::Frame);
        let folder = dir.join(source.truth(index).context("no truth")?);
        std::fs::create_dir_all(&folder)?;
        let picture = flywheel::picture::Picture {
            width: frame.meta.width,
            height: frame.meta.height,
            channels: frame.meta.channels,
            pixels: frame.pixels.clone(),
        };
        std::fs::write(folder.join(format!("{index}.png")), picture.to_png()?)?;
    }
    Ok(())
}

#[test]
fn every_key_is_replaced_by_the_commands_of_the_document() -> Result<()> {
    let mut place = Place::new()?;
    let listed = place.walk("begin", &[])?;
    assert!(listed.contains("2 of 3 root keys"), "{listed}");
    let keys = place.text("keys");
    let rows = place.flywheel.json(&["key", "ls", "--dir", &keys])?;
    let rows = rows.as_array().context("no list of keys")?.clone();
    assert_eq!(rows.len(), 5);
    let stolen = rows[0]["public"]
        .as_str()
        .context("no public key")?
        .to_owned();

    let mut server = place.serve()?;
    let model = place.model()?;
    let model = model.as_str();
    let released = place.walk("release", &[("MODEL", model)])?;
    assert!(released.contains("release 1"), "{released}");
    let mut agent = place.enroll()?;
    place.has_root(1)?;
    place.run(&["rollout", "start", model, "--policy", "all"])?;
    let first = place.run(&["rollout", "watch"])?;
    assert!(first.contains("confirmed"), "{first}");

    // Hand a root in whose rollout key the server lacks: refused, with what to do.
    let before = place.json(&["device", "show", "cam1"])?;
    assert_eq!(before["sequence"], 1);
    let published = place.walk("rollout", &[])?;
    assert!(published.contains("Version 2"), "{published}");
    place.has_root(2)?;

    // The device is off while the release key is replaced, and hears of it when it is back.
    agent.kill();
    let rescue = {
        // `rollout watch` waits for the device, so that it has to come back meanwhile.
        let starting = place.start()?;
        let rescue = place.walk("stolen-release", &[("MODEL", model)])?;
        agent = starting;
        rescue
    };
    assert!(rescue.contains("release 2"), "{rescue}");
    assert!(rescue.contains("confirmed"), "{rescue}");
    place.has_root(3)?;
    let after = place.json(&["device", "show", "cam1"])?;
    assert_eq!(after["sequence"], 2);
    assert_eq!(after["model"], model);

    place.walk("root", &[("STOLEN", &stolen)])?;
    place.has_root(4)?;
    // The stolen root key signs nothing any more: it was moved to where it lay, and is of no use.
    let ann = place.text("ann/root.1.key");
    let partial = place
        .flywheel
        .json(&["key", "rotate", "none", "--dir", &keys, "--key", &ann])?;
    assert_eq!(partial["missing_old"], 2);
    std::fs::remove_file(place.path("keys/trust.partial"))?;
    // A server that starts again goes on with what was published.
    server.kill();
    server = place.serve()?;

    place.walk("all-roots", &[])?;
    place.walk("renew", &[])?;
    place.has_root(6)?;
    assert!(agent.is_running() && server.is_running());

    // A device that was away for all of it walks through every version.
    let last = place.flywheel.json(&["key", "ls", "--dir", &keys])?;
    assert_ne!(last[0]["public"], stolen.as_str());
    let parts = DOCUMENT.matches("```sh walk:").count();
    assert_eq!(place.walked.len(), parts, "a part of TRUST.md is not run");
    Ok(())
}
