//! The agent's configuration: one TOML file, read strictly, so that a misspelt key is an error and
//! not a default.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use device_core::backlog::MAX_BACKLOG;
use device_core::governor::Limits;
use device_core::pace::Pace;
use device_core::retrieval::Least;
use device_core::uplink::Transport;
use device_engine::onnx_runtime;
use serde::Deserialize;
use thiserror::Error;

use crate::models::{EngineChoice, UnknownChoice};

/// Smallest download budget that is not "no limit", in bytes a second: one request in ten seconds.
const MIN_DOWNLOAD: u32 = 100;

/// Why a configuration is not usable.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{path}: cannot read the configuration: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, or has an unknown, missing or mistyped key.
    #[error("{path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, key and what is wrong with it.
        message: String,
    },
    /// A value is out of range.
    #[error("{path}: `{key}` {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong and what to write instead.
        problem: String,
    },
}

/// How the file names a transport.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TransportKind {
    Quic,
    Mqtt,
}

impl From<TransportKind> for Transport {
    fn from(kind: TransportKind) -> Self {
        match kind {
            TransportKind::Quic => Self::Quic,
            TransportKind::Mqtt => Self::Mqtt,
        }
    }
}

/// Shares of the upload budget, by lane; they need not add up to 1.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Shares {
    /// Unlike what the model was trained on.
    pub novel: f32,
    /// The model hesitates.
    pub unsure: f32,
    /// Models disagree, or one flickers.
    pub disagree: f32,
    /// The cloud asked for it.
    pub campaign: f32,
    /// Chosen by lot.
    pub uniform: f32,
}

impl Default for Shares {
    fn default() -> Self {
        Self {
            novel: 0.20,
            unsure: 0.22,
            disagree: 0.05,
            campaign: 0.41,
            uniform: 0.12,
        }
    }
}

/// How much may be uploaded.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Budget {
    /// Bytes uploaded of bytes seen, above 0 to 1.
    pub ratio: f32,
    /// Bytes that may be uploaded in a burst, in KiB.
    pub burst_kib: u32,
    /// Who gets how much of it.
    pub shares: Shares,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            ratio: 0.04,
            burst_kib: 64,
            shares: Shares::default(),
        }
    }
}

/// The queue on disk.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpoolConfig {
    /// Bytes of samples that are kept at most, in MB (10⁶).
    pub quota_mb: u32,
}

impl Default for SpoolConfig {
    fn default() -> Self {
        Self { quota_mb: 256 }
    }
}

/// How models are fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Download {
    /// Bytes a second that are asked for at most; 0 for as many as come.
    pub budget: u32,
    /// Bytes a second below which a sender is not waited for.
    pub least: u32,
    /// Seconds of waiting that a sender may be behind `least`.
    pub patience_s: u32,
}

impl Default for Download {
    fn default() -> Self {
        let least = Least::default();
        Self {
            budget: 0,
            least: least.rate,
            patience_s: (least.patience_ms / 1000) as u32,
        }
    }
}

impl Download {
    /// What is expected of a sender.
    pub fn expects(&self) -> Least {
        Least {
            rate: self.least,
            patience_ms: u64::from(self.patience_s) * 1000,
        }
    }
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Folder of identity, state, spool and models.
    pub data: PathBuf,
    /// URI of the source of frames.
    pub source: String,
    /// Hardware class that manifests are matched against.
    pub hardware: String,
    /// The inference engine, or `auto`.
    pub engine: EngineChoice,
    /// Shared library of ONNX Runtime, if the engine `ort` may be used; a name without a folder is
    /// looked up by the system.
    pub ort_library: Option<PathBuf>,
    /// Transports, the preferred one first; one or two.
    pub transport: Vec<Transport>,
    /// When the next frame is taken.
    pub pace: Pace,
    /// How much may be uploaded.
    pub budget: Budget,
    /// The queue on disk.
    pub spool: SpoolConfig,
    /// How models are fetched.
    pub download: Download,
    /// Milliseconds between health messages.
    pub health_interval_ms: u64,
    /// Seed of everything that is drawn by lot.
    pub seed: u64,
    /// How hard the device may work.
    pub limits: Limits,
    /// Frames that may wait for inference at a pace with a rate.
    pub capture_frames: usize,
    /// Share of the frames that a second model looks at, above 0 to 1.
    pub shadow_share: f32,
    /// Folder of a package that runs beside the live model while none is on trial.
    pub shadow_model: Option<PathBuf>,
    /// Where metrics are served, if anywhere.
    pub metrics: Option<SocketAddr>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawPace {
    Name(String),
    Whole(u32),
    Fps(f32),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    data: PathBuf,
    source: String,
    #[serde(default = "default_hardware")]
    hardware: String,
    #[serde(default = "default_engine")]
    engine: String,
    ort_library: Option<PathBuf>,
    #[serde(default = "default_transport")]
    transport: Vec<TransportKind>,
    #[serde(default = "default_pace")]
    pace: RawPace,
    #[serde(default)]
    budget: Budget,
    #[serde(default)]
    spool: SpoolConfig,
    #[serde(default)]
    download: Download,
    #[serde(default = "default_health")]
    health_interval_ms: u64,
    #[serde(default)]
    seed: u64,
    max_fps: Option<f32>,
    max_cpu: Option<f32>,
    #[serde(default = "default_capture_frames")]
    capture_frames: usize,
    #[serde(default = "default_shadow_share")]
    shadow_share: f32,
    shadow_model: Option<PathBuf>,
    metrics: Option<String>,
}

fn default_hardware() -> String {
    "any-linux".to_owned()
}

fn default_engine() -> String {
    EngineChoice::default().name().to_owned()
}

fn default_transport() -> Vec<TransportKind> {
    vec![TransportKind::Quic, TransportKind::Mqtt]
}

fn default_pace() -> RawPace {
    RawPace::Name("lockstep".to_owned())
}

fn default_capture_frames() -> usize {
    4
}

fn default_shadow_share() -> f32 {
    1.0
}

fn default_health() -> u64 {
    1000
}

impl Config {
    /// Reads and checks a file. A relative `data` is taken from the file's folder.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    /// Checks the text of a configuration; `path` is where it came from.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let raw: Raw = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        let wrong = |key, problem: String| ConfigError::Value {
            path: path.to_owned(),
            key,
            problem,
        };
        let engine = raw
            .engine
            .parse()
            .map_err(|error: UnknownChoice| wrong("engine", format!("is wrong: {error}")))?;
        if raw.ort_library.is_some() && !onnx_runtime::BUILT {
            return Err(wrong(
                "ort_library",
                "is set, but this build is without ONNX Runtime; build it with --features ort, or remove the key"
                    .to_owned(),
            ));
        }
        let pace = pace(&raw.pace).ok_or_else(|| {
            wrong(
                "pace",
                "must be \"lockstep\", \"max\" or a number of frames a second above 0".to_owned(),
            )
        })?;
        let distinct = raw.transport.len() == 1
            || (raw.transport.len() == 2 && raw.transport[0] != raw.transport[1]);
        if !distinct {
            return Err(wrong(
                "transport",
                "must name one or two different transports, such as [\"quic\", \"mqtt\"]"
                    .to_owned(),
            ));
        }
        check_budget(&raw.budget).map_err(|(key, problem)| wrong(key, problem))?;
        if raw.spool.quota_mb == 0 {
            return Err(wrong("spool.quota_mb", "must be at least 1".to_owned()));
        }
        if (1..MIN_DOWNLOAD).contains(&raw.download.budget) {
            return Err(wrong(
                "download.budget",
                format!(
                    "is {}; it must be 0 for no limit, or at least {MIN_DOWNLOAD} bytes a second",
                    raw.download.budget
                ),
            ));
        }
        for (key, value) in [
            ("download.least", raw.download.least),
            ("download.patience_s", raw.download.patience_s),
        ] {
            if value == 0 {
                return Err(wrong(
                    key,
                    "must be at least 1, or a slow sender could hold an update up for good"
                        .to_owned(),
                ));
            }
        }
        if !(50..=3_600_000).contains(&raw.health_interval_ms) {
            return Err(wrong(
                "health_interval_ms",
                format!("is {}; it must be 50 to 3600000", raw.health_interval_ms),
            ));
        }
        if raw.hardware.is_empty() || raw.hardware.len() > 64 {
            return Err(wrong("hardware", "must have 1 to 64 characters".to_owned()));
        }
        if raw.source.is_empty() || raw.source.len() > 1024 {
            return Err(wrong(
                "source",
                "must be a URI such as \"sim:roads?seed=1\" of at most 1024 characters".to_owned(),
            ));
        }
        for (key, limit, most) in [
            ("max_fps", raw.max_fps, 10_000.0),
            ("max_cpu", raw.max_cpu, 1024.0),
        ] {
            // Written so that NaN fails.
            if let Some(limit) = limit.filter(|limit| !(*limit > 0.0 && *limit <= most)) {
                return Err(wrong(
                    key,
                    format!("is {limit}; it must be above 0 and at most {most}"),
                ));
            }
        }
        if !(1..=MAX_BACKLOG).contains(&raw.capture_frames) {
            return Err(wrong(
                "capture_frames",
                format!("is {}; it must be 1 to {MAX_BACKLOG}", raw.capture_frames),
            ));
        }
        if !(raw.shadow_share > 0.0 && raw.shadow_share <= 1.0) {
            return Err(wrong(
                "shadow_share",
                format!(
                    "is {}; it must be above 0 and at most 1, or a trial would never end",
                    raw.shadow_share
                ),
            ));
        }
        let metrics = raw.metrics.map(|text| {
            text.parse().map_err(|_| {
                wrong(
                    "metrics",
                    format!("is {text:?}; it must be ADDRESS:PORT such as \"127.0.0.1:9101\""),
                )
            })
        });
        let metrics = metrics.transpose()?;
        let folder = path.parent().unwrap_or(Path::new(""));
        Ok(Self {
            data: folder.join(raw.data),
            source: raw.source,
            hardware: raw.hardware,
            engine,
            ort_library: raw
                .ort_library
                .map(|library| match library.components().count() {
                    1 => library,
                    _ => folder.join(library),
                }),
            transport: raw.transport.into_iter().map(Transport::from).collect(),
            pace,
            budget: raw.budget,
            spool: raw.spool,
            download: raw.download,
            health_interval_ms: raw.health_interval_ms,
            seed: raw.seed,
            limits: Limits {
                max_fps: raw.max_fps,
                max_cpu: raw.max_cpu,
            },
            capture_frames: raw.capture_frames,
            shadow_share: raw.shadow_share,
            shadow_model: raw.shadow_model.map(|model| folder.join(model)),
            metrics,
        })
    }
}

fn pace(raw: &RawPace) -> Option<Pace> {
    let fps = match raw {
        RawPace::Name(name) => {
            return match name.as_str() {
                "lockstep" => Some(Pace::Lockstep),
                "max" => Some(Pace::Max),
                _ => None,
            };
        }
        RawPace::Whole(fps) => *fps as f32,
        RawPace::Fps(fps) => *fps,
    };
    (fps > 0.0 && fps <= 10_000.0).then_some(Pace::Fps(fps))
}

fn check_budget(budget: &Budget) -> Result<(), (&'static str, String)> {
    if !(budget.ratio > 0.0 && budget.ratio <= 1.0) {
        let problem = format!("is {}; it must be above 0 and at most 1", budget.ratio);
        return Err(("budget.ratio", problem));
    }
    if budget.burst_kib == 0 || budget.burst_kib > 1 << 20 {
        let problem = format!("is {}; it must be 1 to 1048576", budget.burst_kib);
        return Err(("budget.burst_kib", problem));
    }
    let shares = &budget.shares;
    let all = [
        shares.novel,
        shares.unsure,
        shares.disagree,
        shares.campaign,
        shares.uniform,
    ];
    if !all.iter().all(|share| (0.0..=1.0).contains(share)) || all.iter().sum::<f32>() <= 0.0 {
        let problem = "must be 0 to 1 each, and not all 0".to_owned();
        return Err(("budget.shares", problem));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("etc/agent.toml"), text).map_err(|error| error.to_string())
    }

    const LEAST: &str = "data = \"d\"\nsource = \"sim:roads\"\n";

    #[test]
    fn the_least_file_has_sane_defaults() {
        let config = parse(LEAST).unwrap();
        assert_eq!(config.data, Path::new("etc/d"));
        assert_eq!(config.pace, Pace::Lockstep);
        assert_eq!(config.engine.name(), "tract");
        assert_eq!(config.transport, [Transport::Quic, Transport::Mqtt]);
        assert_eq!(config.budget, Budget::default());
        assert!(config.limits.is_none() && config.metrics.is_none());
        assert_eq!((config.capture_frames, config.shadow_share), (4, 1.0));
    }

    #[test]
    fn a_build_without_onnx_runtime_says_so() {
        let extra = "engine = \"ort\"\nort_library = \"lib/libonnxruntime.so\"\n";
        let parsed = parse(&format!("{LEAST}{extra}"));
        if onnx_runtime::BUILT {
            let config = parsed.unwrap();
            assert_eq!(config.engine.name(), "ort");
            assert_eq!(
                config.ort_library.as_deref(),
                Some(Path::new("etc/lib/libonnxruntime.so"))
            );
            let bare = parse(&format!("{LEAST}ort_library = \"libonnxruntime.so\"\n")).unwrap();
            assert_eq!(bare.ort_library, Some("libonnxruntime.so".into()));
        } else {
            let error = parsed.unwrap_err();
            assert!(
                error.contains("`engine`") && error.contains("--features ort"),
                "{error}"
            );
            let error = parse(&format!("{LEAST}ort_library = \"a.so\"\n")).unwrap_err();
            assert!(
                error.contains("`ort_library`") && error.contains("--features"),
                "{error}"
            );
        }
    }

    #[test]
    fn limits_shadow_and_metrics_are_read() {
        let text = "max_fps = 15\nmax_cpu = 0.5\ncapture_frames = 8\nshadow_share = 0.25\nshadow_model = \"second\"\nmetrics = \"127.0.0.1:9101\"\n";
        let config = parse(&format!("{LEAST}{text}")).unwrap();
        let limits = Limits {
            max_fps: Some(15.0),
            max_cpu: Some(0.5),
        };
        assert_eq!(config.limits, limits);
        assert_eq!((config.capture_frames, config.shadow_share), (8, 0.25));
        assert_eq!(
            config.shadow_model.as_deref(),
            Some(Path::new("etc/second"))
        );
        assert_eq!(config.metrics, Some(([127, 0, 0, 1], 9101).into()));
    }

    #[test]
    fn every_kind_of_pace_is_read() {
        for (text, want) in [
            ("\"max\"", Pace::Max),
            ("25", Pace::Fps(25.0)),
            ("0.5", Pace::Fps(0.5)),
        ] {
            let config = parse(&format!("{LEAST}pace = {text}\n")).unwrap();
            assert_eq!(config.pace, want);
        }
    }

    #[test]
    fn errors_name_the_file_and_the_key() {
        for (extra, key) in [
            ("budgett = 1", "budgett"),
            ("[budget]\nratioo = 0.1", "ratioo"),
            ("[budget]\nratio = 0.0", "budget.ratio"),
            ("[budget]\nratio = nan", "budget.ratio"),
            ("[budget.shares]\nnovel = 7", "budget.shares"),
            ("engine = \"tensorflow\"", "engine"),
            ("transport = []", "transport"),
            ("transport = [\"quic\", \"quic\"]", "transport"),
            ("transport = [\"smoke\"]", "smoke"),
            ("pace = -3.0", "pace"),
            ("pace = \"fast\"", "pace"),
            ("health_interval_ms = 1", "health_interval_ms"),
            ("[spool]\nquota_mb = 0", "spool.quota_mb"),
            ("[download]\nbudget = 7", "download.budget"),
            ("[download]\nleast = 0", "download.least"),
            ("[download]\npatience_s = 0", "download.patience_s"),
            ("hardware = \"\"", "hardware"),
            ("max_fps = 0.0", "max_fps"),
            ("max_cpu = nan", "max_cpu"),
            ("capture_frames = 0", "capture_frames"),
            ("shadow_share = 0.0", "shadow_share"),
            ("metrics = \"9101\"", "metrics"),
        ] {
            let error = parse(&format!("{LEAST}{extra}\n")).unwrap_err();
            assert!(error.contains("etc/agent.toml"), "{error}");
            assert!(error.contains(key), "no {key} in: {error}");
        }
        let error = parse("data = \"d\"").unwrap_err();
        assert!(error.contains("source"), "{error}");
        let error = Config::read(Path::new("no-such.toml")).unwrap_err();
        assert!(error.to_string().contains("no-such.toml"));
    }
}
