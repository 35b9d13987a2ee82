//! `flywheel model import`: an ONNX file that somebody else made becomes a package.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use cloud_core::calibrate;
use device_engine::import::{self, BoxKind, Options, TaskKind};
use device_engine::package::{MANIFEST, Package};
use device_engine::{EngineKind, Output, Plan, load, preprocess};
use flywheel_shared::spec::{Activation, Colour, Confidence, Layout, PriorLevel, Scale, Task};

use super::{print_json, print_line};
use crate::picture::Picture;

/// Arguments of `flywheel model import`.
#[derive(Args)]
#[command(
    after_help = "Example: flywheel model import face.onnx --labels faces.txt --scale byte --mean 127 --std 128 --threshold 0.7 --out face/"
)]
pub struct ImportArgs {
    /// The ONNX file.
    file: PathBuf,
    /// Folder to write the package to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Name of the model; the file's name if absent.
    #[arg(long)]
    name: Option<String>,
    /// File with the class names, one a line, in the order of the class scores.
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// What the model is for; inferred from its outputs if absent.
    #[arg(long, value_enum)]
    task: Option<TaskArg>,
    /// Tensor to use as embedding; a classifier's is found if absent.
    #[arg(long, value_name = "TENSOR")]
    embedding: Option<String>,
    /// Order of the input's axes; inferred from its shape if absent.
    #[arg(long, value_enum)]
    layout: Option<LayoutArg>,
    /// Size of the input, if the model leaves it open.
    #[arg(long, value_name = "WxH", value_parser = size)]
    size: Option<(u16, u16)>,
    /// Order of the input's channels.
    #[arg(long, value_enum)]
    colour: Option<ColourArg>,
    /// Range of the input before mean and deviation: 0 to 1, or 0 to 255.
    #[arg(long, value_enum)]
    scale: Option<ScaleArg>,
    /// Mean, one value or one a channel in the tensor's order, in the range of --scale.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    mean: Vec<f32>,
    /// Standard deviation, like --mean.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    std: Vec<f32>,
    /// Smallest confidence of a detection.
    #[arg(long, value_parser = share)]
    threshold: Option<f32>,
    /// Overlap (intersection over union) above which the less confident of two boxes is dropped.
    #[arg(long, value_parser = share)]
    overlap: Option<f32>,
    /// What a detector's scores still need; inferred if absent.
    #[arg(long, value_enum)]
    activation: Option<ActivationArg>,
    /// How a grid detector's class score and objectness make a confidence.
    #[arg(long, value_enum)]
    confidence: Option<ConfidenceArg>,
    /// What an SSD-like detector's boxes are; inferred if absent.
    #[arg(long, value_enum)]
    boxes: Option<BoxArg>,
    /// Priors of an SSD-like detector, in pixels of the input: `8:10,16,24;16:32,48`.
    #[arg(long, value_name = "STRIDE:SIZE,..;..", value_parser = Levels::from_str)]
    priors: Option<Levels>,
    /// Picture for a golden input; may be given several times. Test patterns if absent.
    #[arg(long, value_name = "FILE")]
    golden: Vec<PathBuf>,
    /// Folder of pictures in folders called like their classes, to fit the scores of a classifier.
    #[arg(long, value_name = "DIR")]
    calibrate: Option<PathBuf>,
}

#[derive(ValueEnum, Clone, Copy)]
enum TaskArg {
    Classify,
    Detect,
    Anomaly,
    Embed,
}

#[derive(ValueEnum, Clone, Copy)]
enum LayoutArg {
    Nchw,
    Nhwc,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
enum ColourArg {
    Rgb,
    Bgr,
    Grey,
}

#[derive(ValueEnum, Clone, Copy)]
enum ScaleArg {
    /// 0 to 1.
    Unit,
    /// 0 to 255.
    Byte,
}

#[derive(ValueEnum, Clone, Copy)]
enum ActivationArg {
    Done,
    Softmax,
    Sigmoid,
}

#[derive(ValueEnum, Clone, Copy)]
enum ConfidenceArg {
    Product,
    GeometricMean,
}

#[derive(ValueEnum, Clone, Copy)]
enum BoxArg {
    Corners,
    PixelCorners,
    Offsets,
}

/// Levels of priors as a flag writes them.
#[derive(Clone, Debug, PartialEq)]
struct Levels(Vec<PriorLevel>);

impl FromStr for Levels {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(';')
            .map(|level| {
                let wrong = || format!("{level:?} is not STRIDE:SIZE,SIZE with 1 to 4 sizes");
                let (stride, sizes) = level.split_once(':').ok_or_else(wrong)?;
                let number = |text: &str| {
                    text.trim()
                        .parse::<u16>()
                        .ok()
                        .filter(|number| *number > 0)
                        .ok_or_else(wrong)
                };
                let mut out = PriorLevel {
                    stride: number(stride)?,
                    sizes: [0; 4],
                };
                let sizes = sizes
                    .split(',')
                    .map(number)
                    .collect::<Result<Vec<_>, _>>()?;
                out.sizes
                    .get_mut(..sizes.len())
                    .ok_or_else(wrong)?
                    .copy_from_slice(&sizes);
                Ok(out)
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

fn size(text: &str) -> Result<(u16, u16), String> {
    let side = |text: &str| text.parse::<u16>().ok().filter(|side| *side > 0);
    text.split_once(['x', '×'])
        .and_then(|(width, height)| Some((side(width)?, side(height)?)))
        .ok_or_else(|| format!("{text:?} is not WIDTHxHEIGHT, such as 320x240"))
}

fn share(text: &str) -> Result<f32, String> {
    text.parse()
        .ok()
        .filter(|share: &f32| *share > 0.0 && *share < 1.0)
        .ok_or_else(|| format!("{text:?} is not a number above 0 and below 1"))
}

/// Imports a model and writes its package.
///
/// # Errors
/// If the file can't be read or run, or a flag is missing or wrong; the message names it.
pub fn run(args: &ImportArgs, json: bool) -> Result<ExitCode> {
    let file = args.file.display();
    let onnx = std::fs::read(&args.file).with_context(|| format!("{file}"))?;
    let options = options(args)?;
    let imported = import::import(&onnx, &options).with_context(|| format!("{file}"))?;
    let mut notes = imported.notes;
    let mut package = imported.package;
    let (channels, wanted) = (package.input.channels, args.colour);
    if wanted.is_some_and(|colour| (colour == ColourArg::Grey) != (channels == 1)) {
        bail!("{file}: --colour: the model's input has {channels} channels");
    }
    package.scores = match &args.calibrate {
        Some(dir) => fit(&package, dir, &mut notes)?,
        None => {
            notes.push(
                "Scores are not calibrated: they order frames, but say no probabilities; give --calibrate DIR."
                    .to_owned(),
            );
            calibrate::neutral(package.spec().classes().max(1))?
        }
    };
    package.write(&args.out)?;
    report(&package, &args.out, &notes, json)?;
    Ok(ExitCode::SUCCESS)
}

fn options(args: &ImportArgs) -> Result<Options> {
    let labels = match &args.labels {
        Some(path) => labels(path)?,
        None => Vec::new(),
    };
    let pictures = args
        .golden
        .iter()
        .map(|path| picture(path))
        .collect::<Result<Vec<_>>>()?;
    let stem = args.file.file_stem().map(|stem| stem.to_string_lossy());
    Ok(Options {
        name: match (&args.name, stem) {
            (Some(name), _) => name.clone(),
            (None, stem) => stem.unwrap_or_default().into_owned(),
        },
        task: args.task.map(|task| match task {
            TaskArg::Classify => TaskKind::Classify,
            TaskArg::Detect => TaskKind::Detect,
            TaskArg::Anomaly => TaskKind::Anomaly,
            TaskArg::Embed => TaskKind::Embed,
        }),
        labels,
        embedding: args.embedding.clone(),
        layout: args.layout.map(|layout| match layout {
            LayoutArg::Nchw => Layout::Nchw,
            LayoutArg::Nhwc => Layout::Nhwc,
        }),
        size: args.size,
        colour: args.colour.map(|colour| match colour {
            ColourArg::Bgr => Colour::Bgr,
            ColourArg::Rgb | ColourArg::Grey => Colour::Rgb,
        }),
        scale: args.scale.map(|scale| match scale {
            ScaleArg::Unit => Scale::Unit,
            ScaleArg::Byte => Scale::Byte,
        }),
        mean: args.mean.clone(),
        std: args.std.clone(),
        threshold: args.threshold,
        overlap: args.overlap,
        activation: args.activation.map(|activation| match activation {
            ActivationArg::Done => Activation::Done,
            ActivationArg::Softmax => Activation::Softmax,
            ActivationArg::Sigmoid => Activation::Sigmoid,
        }),
        confidence: args.confidence.map(|confidence| match confidence {
            ConfidenceArg::Product => Confidence::Product,
            ConfidenceArg::GeometricMean => Confidence::GeometricMean,
        }),
        boxes: args.boxes.map(|boxes| match boxes {
            BoxArg::Corners => BoxKind::Corners,
            BoxArg::PixelCorners => BoxKind::PixelCorners,
            BoxArg::Offsets => BoxKind::Offsets,
        }),
        priors: args
            .priors
            .clone()
            .map(|levels| levels.0)
            .unwrap_or_default(),
        pictures: pictures
            .into_iter()
            .map(|picture| import::Picture {
                pixels: picture.pixels,
                width: picture.width,
                height: picture.height,
                channels: picture.channels,
            })
            .collect(),
    })
}

/// Class names, one a line; empty lines at the end don't count.
fn labels(path: &Path) -> Result<Vec<String>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("--labels {}", path.display()))?;
    let labels: Vec<String> = text
        .trim_end()
        .lines()
        .map(|l| l.trim().to_owned())
        .collect();
    for (index, label) in labels.iter().enumerate() {
        if label.is_empty() || labels[..index].contains(label) {
            bail!(
                "--labels {}: line {}: {label:?} is empty or there twice",
                path.display(),
                index + 1
            );
        }
    }
    Ok(labels)
}

fn picture(path: &Path) -> Result<Picture> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    Picture::decode_file(&bytes, None).with_context(|| path.display().to_string())
}

/// Score parameters from pictures in class folders: of each class every second picture gives the
/// statistics of the embedding, the others temperature and tables.
fn fit(package: &Package, dir: &Path, notes: &mut Vec<String>) -> Result<Vec<u8>> {
    let flag = || format!("--calibrate {}", dir.display());
    if !matches!(package.task, Task::Classify(_)) {
        bail!("{}: only the scores of a classifier can be fitted", flag());
    }
    let spec = package.spec();
    let mut plan = load(EngineKind::Tract, &package.bytes(&spec))?;
    let (mut known, mut held) = (Answers::default(), Answers::default());
    for (class, label) in spec.labels().enumerate() {
        let folder = dir.join(label);
        if !folder.is_dir() {
            notes.push(format!(
                "There are no pictures of {label:?} to calibrate on."
            ));
            continue;
        }
        let mut files = std::fs::read_dir(&folder)
            .and_then(|entries| {
                entries
                    .map(|entry| entry.map(|entry| entry.path()))
                    .collect::<Result<Vec<_>, _>>()
            })
            .with_context(|| folder.display().to_string())?;
        files.sort();
        for (index, file) in files.iter().enumerate() {
            let set = if index % 2 == 0 {
                &mut known
            } else {
                &mut held
            };
            set.add(&mut *plan, package, &picture(file)?, class as u32)
                .with_context(|| file.display().to_string())?;
        }
    }
    if held.labels.is_empty() {
        bail!(
            "{}: no class folder has two pictures; folders are called like the labels",
            flag()
        );
    }
    notes.push(format!(
        "Scores are fitted to {} pictures, {} of them held out.",
        known.labels.len() + held.labels.len(),
        held.labels.len()
    ));
    calibrate::fit(calibrate::FitInput {
        classes: spec.classes(),
        dim: usize::from(package.embedding),
        embeddings: &known.embeddings,
        labels: &known.labels,
        held_logits: &held.logits,
        held_embeddings: &held.embeddings,
        held_labels: &held.labels,
        // No lane uses the distance to decision boundaries.
        head: None,
        shrinkage: None,
    })
    .with_context(flag)
}

/// What a model said about a set of pictures, row by row.
#[derive(Default)]
struct Answers {
    logits: Vec<f32>,
    embeddings: Vec<f32>,
    labels: Vec<u32>,
}

impl Answers {
    fn add(
        &mut self,
        plan: &mut dyn Plan,
        package: &Package,
        picture: &Picture,
        label: u32,
    ) -> Result<()> {
        let mut input = vec![0.0; package.input.len()];
        preprocess(&picture.frame(), &package.input, &mut input)?;
        let (logits, dims) = (self.logits.len(), self.embeddings.len());
        self.logits.resize(logits + plan.classes(), 0.0);
        self.embeddings.resize(dims + plan.embedding_dim(), 0.0);
        plan.run(
            &input,
            &mut Output {
                logits: &mut self.logits[logits..],
                heads: &mut [],
                embedding: &mut self.embeddings[dims..],
            },
        )?;
        self.labels.push(label);
        Ok(())
    }
}

fn report(package: &Package, out: &Path, notes: &[String], json: bool) -> Result<()> {
    let task = match package.task {
        Task::Classify(_) => "classify",
        Task::Detect(_) => "detect",
        Task::Anomaly(_) => "anomaly",
        Task::Embed => "embed",
    };
    let classes = package.spec().classes();
    if json {
        return print_json(&serde_json::json!({
            "package": out,
            "name": package.name,
            "task": task,
            "classes": classes,
            "input": package.input.shape(),
            "outputs": package.outputs,
            "embedding": package.embedding,
            "embedding_tensor": package.embedding_name,
            "golden": package.golden.len(),
            "tolerance": package.tolerance,
            "onnx_bytes": package.onnx.len(),
            "notes": notes,
        }));
    }
    print_line(format!(
        "{} is in {}: {task}, {classes} classes, input {:?}, {}, {} golden inputs.",
        package.name,
        out.join(MANIFEST).display(),
        package.input.shape(),
        if package.embedding > 0 {
            format!(
                "embedding of {} values from {:?}",
                package.embedding, package.embedding_name
            )
        } else {
            "no embedding".to_owned()
        },
        package.golden.len()
    ))?;
    for note in notes {
        print_line(format!("  {note}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_shares_and_priors_are_read_or_refused() {
        assert_eq!(size("320x240"), Ok((320, 240)));
        for bad in ["320", "0x240", "x", "320x", "70000x2"] {
            assert!(size(bad).unwrap_err().contains("WIDTHxHEIGHT"), "{bad}");
        }
        assert_eq!(share("0.5"), Ok(0.5));
        assert!(share("1.5").is_err() && share("NaN").is_err());
        let levels: Levels = "8:10,16,24;16:32".parse().unwrap();
        assert_eq!(levels.0[0].sizes, [10, 16, 24, 0]);
        assert_eq!(levels.0[1].stride, 16);
        for bad in ["8", "8:", "8:1,2,3,4,5", "0:1", "8:1;"] {
            assert!(bad.parse::<Levels>().is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_are_lines_without_doubles() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("labels.txt");
        std::fs::write(&path, "stop\nyield \n\n").unwrap();
        assert_eq!(labels(&path).unwrap(), ["stop", "yield"]);
        std::fs::write(&path, "stop\n\nstop\n").unwrap();
        assert!(labels(&path).unwrap_err().to_string().contains("line 2"));
    }

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: ImportArgs,
    }

    /// Runs the command on our own network as another's file, in a folder.
    fn import_with(dir: &Path, flags: &[&str]) -> Result<ExitCode> {
        use clap::Parser;
        let file = dir.join("net.onnx");
        if !file.exists() {
            let config = flywheel_models::NetConfig {
                channels: 3,
                width: 32,
                height: 32,
                classes: 2,
                embedding: 64,
            };
            let record = flywheel_models::Weights::init(&config, 1)?.to_record()?;
            std::fs::write(&file, flywheel_models::export::to_onnx(&config, &record)?)?;
        }
        let program = [std::ffi::OsStr::new("import"), file.as_os_str()];
        let flags = flags.iter().map(std::ffi::OsStr::new);
        run(
            &Line::try_parse_from(program.into_iter().chain(flags))?.args,
            false,
        )
    }

    #[test]
    fn a_file_becomes_a_package_with_or_without_calibration() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(path("labels.txt"), "red\nblue\n").unwrap();
        for (label, colour) in [("red", [200, 10, 10]), ("blue", [10, 10, 200])] {
            std::fs::create_dir_all(dir.path().join("seen").join(label)).unwrap();
            for shade in 0..4u8 {
                let picture = image::RgbImage::from_fn(40, 30, |x, y| {
                    image::Rgb(colour.map(|c: u8| c.wrapping_add(shade * 9 + (x * y % 7) as u8)))
                });
                picture
                    .save(
                        dir.path()
                            .join("seen")
                            .join(label)
                            .join(format!("{shade}.png")),
                    )
                    .unwrap();
            }
        }
        let labels = path("labels.txt");
        import_with(dir.path(), &["--labels", &labels, "--out", &path("plain")]).unwrap();
        let plain = Package::read(Path::new(&path("plain"))).unwrap();
        assert_eq!(
            (plain.name.as_str(), plain.labels.as_str()),
            ("net", "red\nblue")
        );
        let shape = device_core::params::Params::shape_of(&plain.scores).unwrap();
        // Nothing is known about the embedding, so scores fall back to the logits.
        assert_eq!((shape.classes, shape.dim, plain.embedding), (2, 0, 64));

        let flags = [
            "--labels",
            &labels,
            "--calibrate",
            &path("seen"),
            "--mean",
            "0.5",
        ];
        let golden = path("seen/red/0.png");
        let more = ["--golden", &golden, "--out", &path("fitted")];
        import_with(dir.path(), &[&flags[..], &more[..]].concat()).unwrap();
        let fitted = Package::read(Path::new(&path("fitted"))).unwrap();
        let shape = device_core::params::Params::shape_of(&fitted.scores).unwrap();
        assert_eq!((shape.dim, fitted.golden.len()), (64, 1));
    }

    #[test]
    fn wrong_flags_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out").display().to_string();
        let nowhere = dir.path().join("nowhere").display().to_string();
        for (flags, named) in [
            (["--colour", "grey"], "--colour"),
            (["--labels", &nowhere], "--labels"),
            (["--golden", &nowhere], "nowhere"),
            (["--calibrate", &nowhere], "--calibrate"),
            (["--embedding", "nowhere"], "--embedding"),
            (["--size", "64x64"], "--size"),
            (["--size", "64"], "--size"),
            (["--std", "0"], "--std"),
        ] {
            let flags = [&flags[..], &["--out", &out]].concat();
            let error = import_with(dir.path(), &flags).unwrap_err();
            assert!(format!("{error:#}").contains(named), "{named}: {error:#}");
        }
        assert!(!dir.path().join("out").join(MANIFEST).exists());
    }
}
