//! Models that should never have been released, on real agents of a real server: each ends where it
//! should, with a reason that a person understands, and the device keeps what it had.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flywheel_agent::source::{self, FrameBuf, Read};
use flywheel_tests::{Background, Flywheel, wait_until};

struct Stage {
    flywheel: Flywheel,
    dir: tempfile::TempDir,
    _server: Background,
    agent: Background,
    dataset: String,
    releases: u32,
}

impl Stage {
    /// A server, and a device that runs its first model.
    fn set() -> Result<(Self, String)> {
        let flywheel = Flywheel::new(env!("CARGO_BIN_EXE_flywheel-under-test"));
        let dir = tempfile::tempdir()?;
        let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        let (data, keys) = (path("cloud"), path("keys"));
        flywheel.succeed(&["key", "init", "--dir", &keys])?;
        let serve = [
            "serve",
            "--data",
            &data,
            "--keys",
            &keys,
            "--http-port",
            "0",
        ];
        let server = flywheel.start(&serve, &dir.path().join("server.log"))?;
        wait_until("the server answers", || {
            let answer = flywheel.run(&["device", "ls", "--data", &data])?;
            Ok(answer.status.success())
        })
        .with_context(|| fs::read_to_string(dir.path().join("server.log")).unwrap_or_default())?;

        let token = flywheel.succeed(&["device", "enroll", "--device", "cam1", "--data", &data])?;
        let address = fs::read_to_string(Path::new(&data).join("api-address"))?;
        let device = path("cam1");
        let enroll = [
            "agent",
            "enroll",
            "--url",
            address.trim(),
            "--token",
            token.trim(),
            "--data",
            &device,
            "--device",
            "cam1",
        ];
        flywheel.succeed(&enroll)?;
        fs::write(
            path("cam1.toml"),
            format!(
                "data = {device:?}\nsource = \"sim:roads?seed=3\"\npace = 30\nhealth_interval_ms = 200\n"
            ),
        )?;
        let agent = start_agent(&flywheel, dir.path())?;
        let mut stage = Self {
            flywheel,
            dir,
            _server: server,
            agent,
            dataset: String::new(),
            releases: 0,
        };
        pictures(
            "sim:roads?seed=1&conditions=clear-day",
            300,
            &stage.dir.path().join("train"),
        )?;
        pictures(
            "sim:roads?seed=2&mix=balanced",
            120,
            &stage.dir.path().join("golden"),
        )?;
        for split in ["train", "golden"] {
            let folder = stage.path(split);
            stage.run(&["dataset", "import", &folder, "--split", split])?;
        }
        let dataset = stage.json(&["dataset", "freeze"])?;
        stage.dataset = dataset["id"].as_str().context("no dataset id")?.to_owned();
        let model = stage.train(&["--steps", "120"])?;
        stage.roll_out(&model, &[])?;
        stage.ends_with("confirmed")?;
        Ok((stage, model))
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let data = self.path("cloud");
        self.flywheel.succeed(&[args, &["--data", &data]].concat())
    }

    fn json(&self, args: &[&str]) -> Result<serde_json::Value> {
        let data = self.path("cloud");
        self.flywheel.json(&[args, &["--data", &data]].concat())
    }

    fn train(&self, args: &[&str]) -> Result<String> {
        let model = self.json(&[&["train", "--dataset", &self.dataset], args].concat())?;
        Ok(model["id"].as_str().context("no model id")?.to_owned())
    }

    /// Signs a model under these terms, whatever the gate says of it.
    fn release(&mut self, model: &str, terms: &[&str]) -> Result<()> {
        self.releases += 1;
        let manifest = self.path(&format!("{}.bin", self.releases));
        let signature = self.path(&format!("{}.sig", self.releases));
        let key = self.path("keys/release.key");
        let export = ["model", "export", model, "--out", &manifest];
        let exported = self.json(&[&export, terms].concat())?;
        println!(
            "release {}: {} {}",
            self.releases, exported["parts"], exported["deltas"]
        );
        let sign = [
            "model", "sign", &manifest, "--key", &key, "--out", &signature,
        ];
        self.flywheel.succeed(&sign)?;
        self.run(&[
            "model",
            "publish",
            model,
            "--manifest",
            &manifest,
            "--signature",
            &signature,
            "--force",
            "a model that is meant to fail",
        ])?;
        Ok(())
    }

    fn roll_out(&mut self, model: &str, terms: &[&str]) -> Result<()> {
        self.release(model, terms)?;
        self.run(&["rollout", "start", model, "--policy", "canary"])?;
        Ok(())
    }

    /// Waits until the status of the last rollout says this.
    fn ends_with(&self, reason: &str) -> Result<()> {
        let mut last = String::new();
        let found = wait_until("the status says how it ended", || {
            last = self.run(&["rollout", "status"])?;
            Ok(last.contains(reason))
        });
        found.with_context(|| {
            let log = fs::read_to_string(self.dir.path().join("cam1.log")).unwrap_or_default();
            let tail = log.lines().rev().take(30).collect::<Vec<_>>().join("\n");
            format!("no {reason:?} in:\n{last}\nthe agent's log, newest first:\n{tail}")
        })
    }

    /// The device runs this model.
    fn runs(&self, model: &str) -> Result<()> {
        wait_until("the device says what it runs", || {
            Ok(self.json(&["device", "show", "cam1"])?["model"] == model)
        })
    }

    fn blobs(&self) -> Result<BTreeSet<PathBuf>> {
        let mut files = BTreeSet::new();
        for folder in fs::read_dir(self.dir.path().join("cloud/blobs"))? {
            for file in fs::read_dir(folder?.path())? {
                files.insert(file?.path());
            }
        }
        Ok(files)
    }

    fn trials_begun(&self) -> usize {
        let log = fs::read_to_string(self.dir.path().join("cam1.log")).unwrap_or_default();
        log.matches("trial begins").count()
    }
}

fn start_agent(flywheel: &Flywheel, dir: &Path) -> Result<Background> {
    let config = dir.join("cam1.toml");
    let run = ["agent", "run", "--config", &config.to_string_lossy()];
    flywheel.start(&run, &dir.join("cam1.log"))
}

/// Writes pictures of a source into one folder for each class.
fn pictures(uri: &str, count: u64, dir: &Path) -> Result<()> {
    let mut source = source::open(uri)?;
    let mut frame = FrameBuf::new();
    for index in (0..count).map(|at| at * 5) {
        ensure!(source.read(index, &mut frame)? == Read::Frame);
        let folder = dir.join(source.truth(index).context("no truth")?);
        fs::create_dir_all(&folder)?;
        let picture = flywheel::picture::Picture {
            width: frame.meta.width,
            height: frame.meta.height,
            channels: frame.meta.channels,
            pixels: frame.pixels.clone(),
        };
        fs::write(folder.join(format!("{index}.png")), picture.to_png()?)?;
    }
    Ok(())
}

#[test]
fn every_bad_model_ends_with_its_reason_and_a_good_one_is_still_taken() -> Result<()> {
    let (mut stage, first) = Stage::set()?;

    // For other hardware.
    let model = stage.train(&["--steps", "1", "--seed", "1"])?;
    stage.roll_out(&model, &["--hardware", "orin"])?;
    stage.ends_with("the model is for other hardware")?;
    stage.runs(&first)?;

    // Corrupt: what lies on the server is not what was signed, nor are the deltas to it.
    let before = stage.blobs()?;
    let model = stage.train(&["--steps", "1", "--seed", "2"])?;
    stage.release(&model, &[])?;
    for path in stage.blobs()?.difference(&before) {
        let mut bytes = fs::read(path)?;
        let middle = bytes.len() / 2;
        if let Some(byte) = bytes.get_mut(middle) {
            *byte ^= 1;
        }
        fs::write(path, bytes)?;
    }
    stage.run(&["rollout", "start", &model, "--policy", "canary"])?;
    stage.ends_with("the bytes do not have the signed digest or length")?;
    stage.runs(&first)?;

    // Slow, for what its release promises. It starts from the first weights, as the champion's
    // are damaged.
    let model = stage.train(&["--steps", "1", "--seed", "3", "--scratch"])?;
    stage.roll_out(&model, &["--max-latency-us", "1"])?;
    stage.ends_with("the median inference took longer than allowed")?;
    stage.runs(&first)?;

    // Takes the whole process down, again and again.
    let begun = stage.trials_begun();
    let model = stage.train(&["--steps", "1", "--seed", "4", "--scratch"])?;
    stage.roll_out(&model, &["--trial-frames", "1000000"])?;
    for crash in 1..=3 {
        wait_until("the trial begins", || {
            Ok(stage.trials_begun() >= begun + crash)
        })?;
        stage.agent.kill();
        stage.agent = start_agent(&stage.flywheel, stage.dir.path())?;
    }
    stage.ends_with("the device restarted too often during the trial")?;
    stage.runs(&first)?;

    // Worse than the one before.
    let model = stage.train(&["--steps", "1", "--seed", "5", "--scratch"])?;
    stage.roll_out(&model, &["--min-confidence", "0.99"])?;
    stage.ends_with("the mean confidence was too low")?;
    stage.runs(&first)?;

    // None of that keeps a good one away.
    let model = stage.train(&["--steps", "60", "--seed", "6", "--scratch"])?;
    stage.roll_out(&model, &["--min-confidence", "0"])?;
    stage.ends_with("confirmed")?;
    stage.runs(&model)?;
    assert!(stage.agent.is_running());
    Ok(())
}
