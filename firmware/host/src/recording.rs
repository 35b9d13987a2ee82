//! The life that the product image plays again: recorded from the scenario without power cuts.

use device_core::params::Params;
use firmware_device::replay::{BUFFER, CELLS, Flash, Start, Summary, replay};
use firmware_scenario::living::{key, live};
use firmware_scenario::vectors::{DEVICE, HARDWARE, ROOT, SCORES};

/// The recording.
pub fn make() -> Result<Vec<u8>, String> {
    let len = Params::len_f32(SCORES).map_err(|error| error.to_string())?;
    let mut values = vec![0.0; len];
    let params = Params::parse(SCORES, &mut values).map_err(|error| error.to_string())?;
    let mut inputs = Vec::new();
    let mut count = 0;
    let mut buffer = vec![0; 1 << 14];
    let mut text = String::new();
    let mut problem = None;
    live(&mut text, &params, &mut crate::flash(), &[], &mut |timed| {
        match postcard::to_slice(timed, &mut buffer) {
            Ok(bytes) => inputs.extend_from_slice(bytes),
            Err(error) => problem = Some(error.to_string()),
        }
        count += 1;
    })
    .map_err(|failure| failure.to_string())?;
    if let Some(problem) = problem {
        return Err(problem);
    }
    let start = Start {
        device: DEVICE
            .parse()
            .map_err(|error| format!("{DEVICE}: {error}"))?,
        key: key().to_bytes(),
        root: postcard::from_bytes(ROOT).map_err(|error| error.to_string())?,
        scores: SCORES,
        inputs: count,
    };
    let start = postcard::to_slice(&start, &mut buffer).map_err(|error| error.to_string())?;
    Ok([&*start, &inputs].concat())
}

/// What the product image must print.
pub fn expected() -> Result<String, String> {
    let recording = make()?;
    let mut cells = vec![0xFF; CELLS];
    let summary = replay(
        &recording,
        HARDWARE,
        Flash::new(&mut cells),
        &mut [0; BUFFER],
        || 0,
    )
    .map_err(|failure| failure.to_string())?;
    let Summary {
        counts,
        sent,
        flagged,
        spooled,
        live,
        ..
    } = summary;
    Ok(format!(
        "{} {} {} {} {flagged} {spooled} {} {} {}",
        counts.frames,
        counts.unscored,
        counts.messages,
        counts.acknowledged,
        live.unwrap_or(0),
        sent >> 32,
        sent as u32
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_sends_what_the_recorded_device_sent() {
        let line = expected().unwrap();
        assert_eq!(line, expected().unwrap());
        let words: Vec<u64> = line.split(' ').map(|word| word.parse().unwrap()).collect();
        let [
            frames,
            unscored,
            messages,
            acknowledged,
            flagged,
            spooled,
            live,
            ..,
        ] = words[..]
        else {
            panic!("{line}");
        };
        assert!(frames > 1000 && unscored == 0 && live == 7, "{line}");
        assert!(flagged > 30 && messages > 30 && spooled == 0, "{line}");
        assert_eq!(acknowledged, flagged);
    }

    #[test]
    fn a_damaged_recording_is_an_error() {
        let recording = make().unwrap();
        let mut cells = vec![0xFF; CELLS];
        let cut = &recording[..recording.len() - 1];
        assert!(
            replay(
                cut,
                HARDWARE,
                Flash::new(&mut cells),
                &mut [0; BUFFER],
                || 0
            )
            .is_err()
        );
    }
}
