//! The README's walk-through: every station by hand against a running server, and what each says
//! to bad input.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use device_engine::package::Package;
use flywheel_agent::source::{self, FrameBuf, Read};
use flywheel_tests::{Background, Flywheel, wait_until};

struct Cloud {
    flywheel: Flywheel,
    server: Background,
    dir: tempfile::TempDir,
}

impl Cloud {
    fn start() -> Result<Self> {
        let flywheel = Flywheel::new(env!("CARGO_BIN_EXE_flywheel-under-test"));
        let dir = tempfile::tempdir()?;
        let keys = dir.path().join("keys");
        flywheel.succeed(&["key", "init", "--dir", &keys.to_string_lossy()])?;
        let server = start_server(&flywheel, dir.path())?;
        Ok(Self {
            flywheel,
            server,
            dir,
        })
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    fn data(&self) -> String {
        self.path("cloud")
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        self.flywheel
            .succeed(&[args, &["--data", &self.data()]].concat())
    }

    fn json(&self, args: &[&str]) -> Result<serde_json::Value> {
        self.flywheel
            .json(&[args, &["--data", &self.data()]].concat())
    }

    fn fail(&self, code: i32, args: &[&str]) -> Result<String> {
        self.flywheel
            .fail(code, &[args, &["--data", &self.data()]].concat())
    }
}

fn start_server(flywheel: &Flywheel, dir: &Path) -> Result<Background> {
    let data = dir.join("cloud");
    let server = flywheel.start(
        &[
            "serve",
            "--data",
            &data.to_string_lossy(),
            "--keys",
            &dir.join("keys").to_string_lossy(),
            "--http-port",
            "0",
        ],
        &dir.join("server.log"),
    )?;
    wait_until("the server answers", || {
        Ok(flywheel
            .run(&["device", "ls", "--data", &data.to_string_lossy()])?
            .status
            .success())
    })
    .with_context(|| std::fs::read_to_string(dir.join("server.log")).unwrap_or_default())?;
    Ok(server)
}

/// Writes pictures of a source into one folder for each class.
fn pictures(uri: &str, count: u64, dir: &Path) -> Result<()> {
    let mut source = source::open(uri)?;
    let mut frame = FrameBuf::new();
    for index in (0..count).map(|at| at * 5) {
        ensure!(source.read(index, &mut frame)? == Read::Frame);
        let class = source.truth(index).context("no truth")?;
        let folder = dir.join(class);
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
fn every_station_works_by_hand() -> Result<()> {
    let mut cloud = Cloud::start()?;
    let dir = cloud.dir.path().to_owned();

    // What people have at the start: labelled pictures of a clear day, and a set to judge by.
    pictures(
        "sim:roads?seed=1&conditions=clear-day",
        400,
        &dir.join("train"),
    )?;
    pictures("sim:roads?seed=2&mix=balanced", 180, &dir.join("golden"))?;
    cloud.run(&[
        "dataset",
        "import",
        &cloud.path("train"),
        "--split",
        "train",
    ])?;
    cloud.run(&[
        "dataset",
        "import",
        &cloud.path("golden"),
        "--split",
        "golden",
    ])?;
    let again = cloud.json(&[
        "dataset",
        "import",
        &cloud.path("golden"),
        "--split",
        "golden",
    ])?;
    assert_eq!(again["imported"], 0);
    assert_eq!(again["known"], 180);

    let dataset = cloud.json(&["dataset", "freeze"])?;
    let dataset = dataset["id"].as_str().context("no dataset id")?.to_owned();
    assert!(cloud.run(&["dataset", "ls"])?.contains(&dataset[..12]));
    let model = cloud.json(&["train", "--dataset", &dataset[..10], "--steps", "150"])?;
    let model = model["id"].as_str().context("no model id")?.to_owned();

    // Not evaluated yet: promotion is refused and says what to do.
    let keys = cloud.path("keys");
    let refused = cloud.fail(1, &["model", "promote", &model, "--keys", &keys])?;
    assert!(refused.contains("flywheel eval"), "{refused}");
    let judged = cloud.json(&["eval", &model[..10], "--rare", "children"])?;
    assert_eq!(judged["report"]["items"], 180);
    cloud.run(&["model", "promote", &model[..10], "--keys", &keys])?;
    assert!(cloud.run(&["model", "ls"])?.contains("champion"));
    assert!(
        cloud
            .run(&["model", "show", "champion"])?
            .contains("recall")
    );

    // No device yet: the rollout is refused and says what to do.
    let refused = cloud.fail(1, &["rollout", "start", &model[..10]])?;
    assert!(refused.contains("enrol"), "{refused}");

    let device = Device::enroll(&cloud, "cam1", "pace = \"max\"")?;
    let mut agent = device.start(&cloud)?;
    wait_until("the device is known", || {
        Ok(cloud.json(&["device", "show", "cam1"])?["frame"].as_u64() > Some(0))
    })?;
    cloud.run(&["rollout", "start", &model[..10], "--policy", "canary"])?;
    let watched = cloud.run(&["rollout", "watch"])?;
    assert!(watched.contains("confirmed"), "{watched}");
    assert!(cloud.run(&["rollout", "status"])?.contains("cam1"));
    let ended = cloud.fail(1, &["rollout", "abort", "1", "--reason", "test"])?;
    assert!(ended.contains("ended"), "{ended}");

    // Samples arrive and are labelled.
    wait_until("there is something to label", || {
        Ok(cloud.json(&["queue", "stats"])?["pending"].as_u64() >= Some(5))
    })?;
    let items = cloud.json(&["queue", "next", "--worker", "ann", "--count", "3"])?;
    let number = |at: usize| items[at]["id"].as_u64().map(|id| id.to_string());
    let (first, second) = (number(0).context("no item")?, number(1).context("no item")?);
    let stolen = cloud.fail(1, &["queue", "label", &first, "stop", "--worker", "bob"])?;
    assert!(stolen.contains("not leased to bob"), "{stolen}");
    cloud.run(&["queue", "label", &first, "stop", "--worker", "ann"])?;
    let twice = cloud.fail(1, &["queue", "label", &first, "stop", "--worker", "ann"])?;
    assert!(twice.contains("already"), "{twice}");
    cloud.run(&[
        "queue", "skip", &second, "--reason", "too dark", "--worker", "ann",
    ])?;
    assert!(
        cloud
            .run(&["queue", "ls", "--state", "labelled"])?
            .contains("stop")
    );
    let shown = cloud.run(&["queue", "next", "--worker", "ann"])?;
    assert!(shown.contains("/v1/pictures/"), "{shown}");

    // A server that is killed and started again has lost none of it.
    cloud.server.kill();
    cloud.server = start_server(&cloud.flywheel, &dir)?;
    let stats = cloud.json(&["queue", "stats"])?;
    assert_eq!(stats["labelled"], 1);
    assert_eq!(stats["skipped"], 1);
    // Pseudo-labels are taken in or not, as asked; what was put aside stays out of both.
    let strict = cloud.json(&["dataset", "freeze", "--pseudo-above", "1"])?;
    assert_eq!(strict["pseudo"], 0);
    let wrong = cloud.fail(1, &["dataset", "freeze", "--pseudo-above", "1.5"])?;
    assert!(wrong.contains("pseudo_above"), "{wrong}");
    let lax = cloud.json(&["dataset", "freeze", "--pseudo-above", "0"])?;
    let pending = cloud.json(&["queue", "stats"])?["pending"].as_u64();
    assert!(lax["pseudo"].as_u64() > Some(0), "{lax}");
    assert!(
        lax["pseudo"].as_u64() <= pending,
        "{lax}, {pending:?} pending"
    );
    assert!(lax["train"].as_u64() >= strict["train"].as_u64(), "{lax}");
    let next = cloud.json(&["dataset", "freeze"])?;
    let next = next["id"].as_str().context("no dataset id")?.to_owned();
    let diff = cloud.json(&["dataset", "diff", &dataset, &next])?;
    // The label, and the other pictures of the same encounter.
    assert!(diff["added"].as_u64() >= Some(1), "{diff}");

    // The agent goes on by itself, and the books balance while it runs.
    assert!(agent.is_running());
    wait_until("the audit balances", || {
        Ok(cloud.json(&["audit"])?["balanced"] == true)
    })?;

    // A revoked device is refused.
    cloud.run(&["device", "revoke", "cam1"])?;
    assert!(cloud.run(&["device", "ls"])?.contains("revoked"));
    wait_until("the revoked device is cut off", || {
        Ok(cloud.json(&["device", "show", "cam1"])?["transport"].is_null())
    })?;
    Ok(())
}

/// Imports an ONNX file, hands it in, judges it, and rolls it out to a device that runs it.
/// Without a `reason` the gate must let it through.
fn publish(
    cloud: &Cloud,
    onnx: &str,
    flags: &[&str],
    source: &str,
    reason: Option<&str>,
) -> Result<serde_json::Value> {
    let package = cloud.path("package");
    let import = [
        &[
            "model", "import", onnx, "--out", &package, "--name", "theirs",
        ],
        flags,
    ]
    .concat();
    cloud.flywheel.succeed(&import)?;
    let added = cloud.json(&["model", "add", &package])?;
    let model = added["id"].as_str().context("no model id")?.to_owned();
    assert_eq!(added["name"], "theirs");
    // The same again is the same model.
    assert_eq!(cloud.json(&["model", "add", &package])?["id"], added["id"]);
    assert!(cloud.run(&["model", "ls"])?.contains("theirs"));

    let keys = cloud.path("keys");
    let promote = ["model", "promote", model.as_str(), "--keys", &keys];
    let refused = cloud.fail(1, &promote)?;
    assert!(refused.contains("flywheel eval"), "{refused}");
    // The gate may say no, which is an exit code.
    let data = cloud.data();
    let judge = ["eval", model.as_str(), "--json", "--data", &data];
    let judged = cloud.flywheel.run(&judge)?;
    let judged: serde_json::Value = serde_json::from_slice(&judged.stdout)?;
    match reason {
        Some(reason) => cloud.run(&[&promote[..], &["--force", reason]].concat())?,
        None => cloud.run(&promote)?,
    };

    let device = Device::enroll(cloud, "cam1", "pace = \"max\"\nengine = \"auto\"")?;
    let config = std::fs::read_to_string(&device.config)?;
    std::fs::write(&device.config, config.replace("sim:roads?seed=3", source))?;
    let _agent = device.start(cloud)?;
    wait_until("the device is known", || {
        Ok(cloud.json(&["device", "show", "cam1"])?["frame"].as_u64() > Some(0))
    })?;
    cloud.run(&["rollout", "start", &model, "--policy", "all"])?;
    let watched = cloud.run(&["rollout", "watch"])?;
    assert!(watched.contains("confirmed"), "{watched}");
    wait_until("the device says that it runs the model", || {
        Ok(cloud.json(&["device", "show", "cam1"])?["model"] == model.as_str())
    })?;
    // It takes each frame as it comes, so that it gives up none, and says so.
    assert_eq!(cloud.json(&["device", "show", "cam1"])?["dropped"], 0);
    // Samples that the model has scored arrive, and the queue ranks them with it.
    wait_until("there is something to label", || {
        Ok(cloud.json(&["queue", "stats"])?["pending"].as_u64() >= Some(3))
    })?;
    cloud.run(&["queue", "next", "--worker", "ann", "--count", "2"])?;
    Ok(judged)
}

#[test]
fn a_model_that_others_made_reaches_a_device() -> Result<()> {
    let cloud = Cloud::start()?;
    let classes = flywheel_models::sim::CLASSES;
    let config = flywheel_models::NetConfig {
        channels: 3,
        width: 32,
        height: 32,
        classes: classes.len(),
        embedding: 64,
    };
    let record = flywheel_models::Weights::init(&config, 1)?.to_record()?;
    let onnx = flywheel_models::export::to_onnx(&config, &record)?;
    std::fs::write(cloud.path("net.onnx"), onnx)?;
    std::fs::write(cloud.path("labels.txt"), classes.join("\n"))?;
    pictures(
        "sim:roads?seed=2&mix=balanced",
        60,
        &cloud.dir.path().join("golden"),
    )?;
    let golden = cloud.path("golden");
    cloud.run(&["dataset", "import", &golden, "--split", "golden"])?;
    let judged = publish(
        &cloud,
        &cloud.path("net.onnx"),
        &[
            "--labels",
            &cloud.path("labels.txt"),
            "--mean",
            "0.5",
            "--std",
            "0.25",
        ],
        "sim:roads?seed=3&size=48",
        Some("a network that nobody trained"),
    )?;
    assert_eq!(judged["report"]["items"], 60);

    // A request that is sent twice, as after a lost answer, is one job.
    let client = flywheel::client::Client::from_data(Path::new(&cloud.data()), None)?;
    let mut request = serde_json::json!({"model": "champion", "rare": [], "key": "once"});
    let first: serde_json::Value = client.post("/v1/eval", &request)?;
    let again: serde_json::Value = client.post("/v1/eval", &request)?;
    assert_eq!(first["id"], again["id"]);
    request["rare"] = serde_json::json!(["deer"]);
    let other = client.post::<_, serde_json::Value>("/v1/eval", &request);
    assert!(other.unwrap_err().to_string().contains("\"once\""));

    // What devices would refuse is refused here: a package whose golden answers are others'.
    let mut package = Package::read(Path::new(&cloud.path("package")))?;
    package.golden[0].answer[0] += 100.0;
    package.write(Path::new(&cloud.path("wrong")))?;
    let refused = cloud.fail(1, &["model", "add", &cloud.path("wrong")])?;
    assert!(refused.contains("golden input 0"), "{refused}");
    let none = cloud.fail(1, &["model", "add", &cloud.path("golden")])?;
    assert!(none.contains("model.toml"), "{none}");
    Ok(())
}

#[test]
fn a_published_digit_reader_is_judged_and_rolled_out() -> Result<()> {
    let (Some(images), Some(model)) = (
        flywheel_tests::data_dir("mnist_idx"),
        flywheel_tests::data_dir("models/libonnx/mnist_8"),
    ) else {
        return Ok(());
    };
    let cloud = Cloud::start()?;
    let source = format!("idx:{}", images.display());
    pictures(&source, 200, &cloud.dir.path().join("golden"))?;
    let golden = cloud.path("golden");
    cloud.run(&["dataset", "import", &golden, "--split", "golden"])?;
    let digits = (0..10).map(|digit| format!("{digit}\n"));
    std::fs::write(cloud.path("labels.txt"), digits.collect::<String>())?;
    let judged = publish(
        &cloud,
        &model.join("model.onnx").to_string_lossy(),
        &["--labels", &cloud.path("labels.txt"), "--scale", "byte"],
        &source,
        None,
    )?;
    assert!(
        judged["report"]["accuracy"].as_f64() > Some(0.95),
        "{judged}"
    );
    assert_eq!(judged["gate"]["passed"], true);
    Ok(())
}

struct Device {
    config: String,
    log: std::path::PathBuf,
}

impl Device {
    fn enroll(cloud: &Cloud, id: &str, extra: &str) -> Result<Self> {
        let data = cloud.dir.path().join(id);
        let token = cloud.run(&["device", "enroll", "--device", id])?;
        let address = std::fs::read_to_string(Path::new(&cloud.data()).join("api-address"))?;
        let enroll = |token: &str| {
            cloud.flywheel.run(&[
                "agent",
                "enroll",
                "--url",
                address.trim(),
                "--token",
                token,
                "--data",
                &data.to_string_lossy(),
                "--device",
                id,
            ])
        };
        let wrong = enroll("0123456789abcdef0123456789abcdef")?;
        assert!(!wrong.status.success());
        let output = enroll(token.trim())?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let config = cloud.dir.path().join(format!("{id}.toml"));
        std::fs::write(
            &config,
            format!(
                "data = {:?}\nsource = \"sim:roads?seed=3\"\n{extra}\nhealth_interval_ms = 200\n",
                data.to_string_lossy()
            ),
        )?;
        Ok(Self {
            config: config.to_string_lossy().into_owned(),
            log: cloud.dir.path().join(format!("{id}.log")),
        })
    }

    fn start(&self, cloud: &Cloud) -> Result<Background> {
        cloud
            .flywheel
            .start(&["agent", "run", "--config", &self.config], &self.log)
    }
}

/// A model of the labelled pictures, promoted whatever the gate says of so short a training.
fn promoted(cloud: &Cloud, dataset: &str, seed: &str) -> Result<String> {
    let args = [
        "train",
        "--dataset",
        dataset,
        "--steps",
        "40",
        "--seed",
        seed,
    ];
    let model = cloud.json(&args)?;
    let model = model["id"].as_str().context("no model id")?.to_owned();
    // Exit code 3 when the gate refuses it, which is as good here.
    cloud
        .flywheel
        .run(&["eval", &model, "--data", &cloud.data()])?;
    let keys = cloud.path("keys");
    let force = ["--force", "a test of what comes after"];
    cloud.run(&[&["model", "promote", &model, "--keys", &keys][..], &force].concat())?;
    Ok(model)
}

#[test]
fn a_rollout_halts_and_its_devices_go_back_without_anybody() -> Result<()> {
    let mut cloud = Cloud::start()?;
    let dir = cloud.dir.path().to_owned();
    pictures("sim:roads?seed=1", 120, &dir.join("train"))?;
    pictures("sim:roads?seed=2&mix=balanced", 60, &dir.join("golden"))?;
    for set in ["train", "golden"] {
        cloud.run(&["dataset", "import", &cloud.path(set), "--split", set])?;
    }
    let dataset = cloud.json(&["dataset", "freeze"])?;
    let dataset = dataset["id"].as_str().context("no dataset id")?.to_owned();
    let first = promoted(&cloud, &dataset, "1")?;

    // Two devices of a site, by label; a third that is not of it.
    let mut devices = std::collections::BTreeMap::new();
    for id in ["cam1", "cam2", "cam3"] {
        let device = Device::enroll(&cloud, id, "pace = \"max\"")?;
        let agent = device.start(&cloud)?;
        devices.insert(id.to_owned(), (device, agent));
        if id != "cam3" {
            cloud.run(&["device", "tag", id, "site=yard"])?;
        }
    }
    let bad = cloud.fail(1, &["device", "tag", "cam1", "site=a?b"])?;
    assert!(bad.contains("label"), "{bad}");
    wait_until("all devices are known", || {
        let known = cloud.json(&["device", "ls"])?;
        let all = known.as_array().context("no list")?;
        Ok(all.iter().all(|device| device["frame"].as_u64() > Some(0)))
    })?;
    let yard = ["--to", "label.site=yard"];
    cloud.run(&[&["rollout", "start", &first, "--policy", "all"][..], &yard].concat())?;
    assert!(cloud.run(&["rollout", "watch"])?.contains("2 confirmed"));
    assert_eq!(cloud.json(&["device", "show", "cam3"])?["sequence"], 0);
    // It joins later and gets the right model.
    cloud.run(&["device", "tag", "cam3", "site=yard"])?;
    wait_until("the late device has the model", || {
        Ok(cloud.json(&["device", "show", "cam3"])?["sequence"] == 1)
    })?;

    let second = promoted(&cloud, &dataset, "2")?;
    let policy = cloud.path("night.toml");
    std::fs::write(&policy, "name = \"night\"\ncanery = 1\n")?;
    let start = [
        &["rollout", "start", "champion", "--policy", &policy][..],
        &yard,
    ]
    .concat();
    let refused = cloud.fail(1, &start)?;
    assert!(refused.contains("canery"), "{refused}");
    std::fs::write(
        &policy,
        "name = \"night\"\ncanary = 1\n[gate]\nsoak_s = 86400\nmax_restarts = 0\n",
    )?;
    let plan = cloud.json(
        &[
            &["rollout", "plan", "champion", "--policy", &policy][..],
            &yard,
        ]
        .concat(),
    )?;
    assert_eq!(plan["waves"].as_array().map(Vec::len), Some(2));
    assert_eq!((&plan["sequence"], &plan["back"]), (&2.into(), &3.into()));
    let canary = plan["waves"][0][0]
        .as_str()
        .context("no canary")?
        .to_owned();
    assert_eq!(
        cloud.json(&["rollout", "ls"])?.as_array().map(Vec::len),
        Some(1)
    );
    cloud.run(&start)?;
    let state = |cloud: &Cloud| cloud.json(&["rollout", "status"]);
    wait_until("the canary has confirmed", || {
        Ok(state(&cloud)?["devices"][&canary]["state"] == "confirmed")
    })?;
    let silent = cloud.fail(1, &["rollout", "pause", "2", "--reason", " "])?;
    assert!(silent.contains("say why"), "{silent}");
    cloud.run(&["rollout", "pause", "2", "--reason", "storm"])?;
    // A controller that is killed goes on where it was.
    cloud.server.kill();
    cloud.server = start_server(&cloud.flywheel, &dir)?;
    assert_eq!(state(&cloud)?["state"], "paused");
    cloud.run(&["rollout", "resume", "2"])?;
    assert!(
        state(&cloud)?["waits_for"]
            .as_str()
            .is_some_and(|why| why.starts_with("soaking"))
    );

    // The canary goes down and comes up again: once more than the policy allows.
    let (device, agent) = devices.get_mut(&canary).context("the canary is a device")?;
    agent.kill();
    *agent = device.start(&cloud)?;
    wait_until("the rollout has halted", || {
        Ok(state(&cloud)?["state"] == "halted")
    })?;
    wait_until("the canary is back", || {
        Ok(state(&cloud)?["devices"][&canary]["state"] == "returned")
    })?;
    cloud.fail(3, &["rollout", "watch"])?;
    let ended = state(&cloud)?;
    assert!(
        ended["reason"]
            .as_str()
            .is_some_and(|why| why.contains("restarted")),
        "{ended}"
    );
    let others = ended["devices"].as_object().context("no devices")?.iter();
    let mut others = others.filter(|(id, _)| **id != canary);
    assert!(
        others.all(|(_, device)| device["state"] == "pending"),
        "{ended}"
    );
    // It runs the first model again, released once more, and so the next one is trained from that.
    let back = cloud.json(&["device", "show", &canary])?;
    assert_eq!(
        (&back["sequence"], &back["model"]),
        (&3.into(), &first.clone().into())
    );
    assert_eq!(cloud.json(&["model", "show", "champion"])?["id"], first);
    assert_ne!(first, second);

    let keys = cloud.path("keys");
    let log = cloud.run(&["rollout", "log", "--rollout", "2"])?;
    for words in [
        "started",
        "paused: storm",
        "halted",
        "the champion again",
        "offered to",
    ] {
        assert!(log.contains(words), "{words}: {log}");
    }
    let verified = cloud.json(&["rollout", "log", "--verify", "--keys", &keys])?;
    assert_eq!(verified["valid"], true);
    let digest = verified["digest"].as_str().context("no digest")?;
    cloud.run(&[
        "rollout",
        "log",
        "--verify",
        "--keys",
        &keys,
        "--contains",
        digest,
    ])?;
    let forged = "00".repeat(32);
    cloud.fail(3, &["rollout", "log", "--verify", "--key", &forged])?;
    Ok(())
}

#[test]
fn bad_input_gets_a_clear_error() -> Result<()> {
    let cloud = Cloud::start()?;
    let dir = cloud.dir.path();

    // A second server on the same data folder.
    let second = cloud.flywheel.fail(
        1,
        &[
            "serve",
            "--data",
            &cloud.data(),
            "--keys",
            &cloud.path("keys"),
            "--http-port",
            "0",
        ],
    )?;
    assert!(
        second.contains("cloud") && second.contains("in use"),
        "{second}"
    );

    // A wrong token, no token, no server.
    let address = std::fs::read_to_string(dir.join("cloud/api-address"))?;
    let wrong = cloud.flywheel.fail(
        5,
        &[
            "queue",
            "ls",
            "--server",
            address.trim(),
            "--token",
            "guess",
        ],
    )?;
    assert!(wrong.contains("token"), "{wrong}");
    let none = cloud.flywheel.fail(5, &["queue", "ls"])?;
    assert!(none.contains("FLYWHEEL_TOKEN"), "{none}");
    let nobody = cloud.flywheel.fail(
        4,
        &[
            "queue",
            "ls",
            "--server",
            "http://127.0.0.1:1",
            "--token",
            "x",
        ],
    )?;
    assert!(nobody.contains("127.0.0.1:1"), "{nobody}");

    // A corrupt picture, and one that would leak from the golden set into training.
    let train = dir.join("train/stop");
    std::fs::create_dir_all(&train)?;
    std::fs::write(train.join("bad.png"), b"\x89PNG\r\n\x1a\nnot really")?;
    let corrupt = cloud.fail(
        1,
        &[
            "dataset",
            "import",
            &cloud.path("train"),
            "--split",
            "train",
        ],
    )?;
    assert!(
        corrupt.contains("bad.png") && corrupt.contains("damaged"),
        "{corrupt}"
    );
    pictures("sim:roads?seed=5", 1, &dir.join("one"))?;
    cloud.run(&["dataset", "import", &cloud.path("one"), "--split", "golden"])?;
    let leak = cloud.fail(
        1,
        &["dataset", "import", &cloud.path("one"), "--split", "train"],
    )?;
    assert!(leak.contains("one set only"), "{leak}");

    // Names that do not exist.
    for args in [
        &["model", "show", "abc"][..],
        &["dataset", "show", "abc"],
        &["train", "--dataset", "abc"],
        &["rollout", "status"],
        &["device", "show", "cam9"],
        &["queue", "label", "99", "stop"],
    ] {
        let unknown = cloud.fail(1, args)?;
        assert!(!unknown.contains("panicked"), "{unknown}");
    }
    let usage = cloud.flywheel.fail(2, &["queue", "label", "x", "stop"])?;
    assert!(usage.contains("invalid value"), "{usage}");

    // A configuration with an unknown key.
    let device = Device::enroll(&cloud, "cam2", "sauce = \"sim:roads\"")?;
    let unknown = cloud
        .flywheel
        .run(&["agent", "run", "--config", &device.config])?;
    let text = String::from_utf8_lossy(&unknown.stderr);
    assert!(!unknown.status.success());
    assert!(
        text.contains("sauce") && text.contains("cam2.toml"),
        "{text}"
    );
    Ok(())
}

#[test]
fn the_api_describes_itself() -> Result<()> {
    let cloud = Cloud::start()?;
    let client = flywheel::client::Client::from_data(Path::new(&cloud.data()), None)?;
    let document: serde_json::Value = client.get("/openapi.json")?;
    let paths = document["paths"].as_object().context("no paths")?;
    for path in [
        "/v1/enroll",
        "/v1/queue/next",
        "/v1/queue/label",
        "/v1/train",
        "/v1/models/{id}/promote",
        "/v1/rollouts",
        "/v1/audit",
    ] {
        assert!(paths.contains_key(path), "{path} is not described");
    }
    Ok(())
}
