//! The training loop.

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor, TensorData};
use flywheel_models::{Weights, export};

use crate::head::Features;
use crate::optimiser::Optimiser;
use crate::sampler::Sampler;
use crate::shard::{Job, Outcome, Shard, argmax, normalise};
use crate::{Champion, Example, Fit, Progress, TrainConfig, TrainError, Trained};

/// Examples on which the training accuracy is measured, at most.
const MEASURED: usize = 1024;

/// Trains a network, from a champion if there is one, on all of `examples` (the caller passes old
/// and new ones: replay is what keeps old classes).
///
/// The same arguments give the same bytes on the same kind of machine, whatever its number of
/// cores. `progress` is called after every step and may break off.
///
/// # Errors
/// [`TrainError`], before any work for bad arguments.
pub fn train(
    config: &TrainConfig,
    examples: &[Example],
    champion: Option<Champion<'_>>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Trained, TrainError> {
    validate(config, examples)?;
    let mut weights = match champion {
        Some(champion) => Weights::from_record(champion.config, champion.record)?
            .grow(&config.net, config.seed)?,
        None => Weights::init(&config.net, config.seed)?,
    };
    if config.fit == Fit::Head && champion.is_none() {
        return Err(TrainError::Config {
            field: "fit",
            found: "head".to_owned(),
            want: "a champion whose features are kept, or the whole network",
        });
    }
    let mut optimiser = Optimiser::new(config, &weights);
    let mut sampler = Sampler::new(examples, config.net.classes, config.balance, config.seed);
    let mut worker = match config.fit {
        Fit::Whole => Worker::Whole(
            (0..config.shards)
                .map(|_| Shard::new(config))
                .collect::<Result<Vec<_>, _>>()?,
        ),
        Fit::Head => Worker::Head(Features::new(config, examples, &weights)?),
    };
    let mut report = Progress {
        step: 0,
        steps: config.steps,
        loss: 0.0,
        accuracy: 0.0,
    };
    for step in 0..config.steps {
        let picks = sampler.draw(config.batch);
        let job = Job {
            config,
            examples,
            weights: &weights,
            step,
        };
        let outcome = match &mut worker {
            Worker::Whole(shards) => run_step(shards, &job, &picks)?,
            Worker::Head(features) => features.step(&job, &picks),
        };
        if !outcome.loss.is_finite() || !outcome.harvest.iter().all(|value| value.is_finite()) {
            return Err(TrainError::Diverged { step });
        }
        optimiser.step(&mut weights, &outcome.harvest);
        let loss = outcome.loss / config.batch as f32;
        let accuracy = outcome.correct as f32 / config.batch as f32;
        // An average over about the last 20 steps.
        let fresh = (1.0 / (step + 1) as f32).max(0.05);
        report.step = step + 1;
        report.loss += fresh * (loss - report.loss);
        report.accuracy += fresh * (accuracy - report.accuracy);
        if progress(report).is_break() {
            return Err(TrainError::Cancelled { step: step + 1 });
        }
    }
    optimiser.finish(&mut weights);
    let record = weights.to_record()?;
    Ok(Trained {
        onnx: export::to_onnx(&config.net, &record)?,
        record,
        loss: report.loss,
        train_accuracy: measure(config, examples, &weights)?,
    })
}

/// What takes a step.
enum Worker {
    Whole(Vec<Shard>),
    Head(Features),
}

/// Runs one batch over the shards and adds up what they found, in shard order.
fn run_step(shards: &mut [Shard], job: &Job<'_>, picks: &[usize]) -> Result<Outcome, TrainError> {
    let size = picks.len().div_ceil(shards.len());
    let outcomes: Vec<Result<Outcome, TrainError>> = std::thread::scope(|scope| {
        let running: Vec<_> = shards
            .iter_mut()
            .zip(picks.chunks(size))
            .enumerate()
            .map(|(i, (shard, part))| scope.spawn(move || shard.run(job, part, i * size)))
            .collect();
        running
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(TrainError::Threads("a worker panicked".to_owned())))
            })
            .collect()
    });
    let mut total = Outcome {
        harvest: vec![0.0; job.weights.values().len()],
        loss: 0.0,
        correct: 0,
    };
    for (outcome, part) in outcomes.into_iter().zip(picks.chunks(size)) {
        let outcome = outcome?;
        let share = part.len() as f32 / picks.len() as f32;
        for (sum, value) in total.harvest.iter_mut().zip(outcome.harvest) {
            *sum += share * value;
        }
        total.loss += outcome.loss;
        total.correct += outcome.correct;
    }
    Ok(total)
}

/// Accuracy of the folded network on the examples as they are.
fn measure(
    config: &TrainConfig,
    examples: &[Example],
    weights: &Weights,
) -> Result<f32, TrainError> {
    let device = Device::flex();
    let net = weights.frozen(&device);
    let (len, classes) = (config.net.input_len(), config.net.classes);
    let every = examples.len().div_ceil(MEASURED);
    let measured: Vec<usize> = (0..examples.len()).step_by(every).collect();
    let mut correct = 0;
    for part in measured.chunks(64) {
        let mut images = vec![0.0; part.len() * len];
        for (&index, out) in part.iter().zip(images.chunks_exact_mut(len)) {
            normalise(config, &examples[index].pixels, out)
                .map_err(|error| TrainError::Pixels { index, error })?;
        }
        let shape = config.net.batch_shape(part.len());
        let images = Tensor::<4>::from_data(TensorData::new(images, shape), &device);
        let data = net.forward(images).0.into_data();
        if let Ok(values) = data.as_slice::<f32>() {
            correct += values
                .chunks_exact(classes)
                .zip(part)
                .filter(|(row, index)| argmax(row) == examples[**index].label as usize)
                .count();
        }
    }
    Ok(correct as f32 / measured.len() as f32)
}

fn validate(config: &TrainConfig, examples: &[Example]) -> Result<(), TrainError> {
    config.net.validate()?;
    let bad = |field, found: String, want| Err(TrainError::Config { field, found, want });
    let input = &config.input;
    if (
        usize::from(input.width),
        usize::from(input.height),
        usize::from(input.channels),
    ) != (config.net.width, config.net.height, config.net.channels)
    {
        return bad(
            "input",
            format!("{}×{}×{}", input.width, input.height, input.channels),
            "the size and channels of `net`",
        );
    }
    if !(1..=64).contains(&config.shards) {
        return bad("shards", config.shards.to_string(), "1 to 64");
    }
    if config.batch < 2 * config.shards {
        return bad(
            "batch",
            config.batch.to_string(),
            "at least 2 images a shard, which batch norm needs",
        );
    }
    if config.steps == 0 {
        return bad("steps", "0".to_owned(), "at least 1");
    }
    let above_zero = |value: f32| value.is_finite() && value > 0.0;
    let unit = |value: f32| (0.0..1.0).contains(&value);
    for (field, value, fine, want) in [
        ("lr", config.lr, above_zero(config.lr), "a number above 0"),
        (
            "clip",
            config.clip,
            above_zero(config.clip),
            "a number above 0",
        ),
        (
            "ema",
            config.ema,
            unit(config.ema),
            "0 up to, not including, 1",
        ),
        (
            "label_smoothing",
            config.label_smoothing,
            unit(config.label_smoothing),
            "0 up to, not including, 1",
        ),
        (
            "weight_decay",
            config.weight_decay,
            (0.0..=10.0).contains(&config.weight_decay),
            "0 to 10",
        ),
        (
            "balance",
            config.balance,
            (0.0..=2.0).contains(&config.balance),
            "0 to 2",
        ),
    ] {
        if !fine {
            return bad(field, value.to_string(), want);
        }
    }
    if let Err((field, value)) = config.augment.validate() {
        return bad(field, value.to_string(), "0 to 2");
    }
    let mut total = 0.0;
    for (index, example) in examples.iter().enumerate() {
        if example.label as usize >= config.net.classes {
            return Err(TrainError::Label {
                index,
                label: example.label,
                classes: config.net.classes,
            });
        }
        let want = config.net.input_len();
        if example.pixels.len() != want {
            return Err(TrainError::Pixels {
                index,
                error: device_engine::InputError::FrameLen {
                    found: example.pixels.len(),
                    want,
                },
            });
        }
        if !(example.weight.is_finite() && example.weight >= 0.0) {
            return bad(
                "weight of an example",
                example.weight.to_string(),
                "a finite number, 0 or more",
            );
        }
        total += example.weight;
    }
    if total <= 0.0 {
        return Err(TrainError::Empty);
    }
    Ok(())
}
