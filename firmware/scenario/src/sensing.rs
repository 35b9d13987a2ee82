//! A thermal sensor on a simulated bus is read as a device without a camera would: pictures, one out
//! of range, and a bus that fails once.

use core::cell::RefCell;
use core::fmt::Write;

use device_core::thermal::{ADDRESS, PIXELS, Rate, STEPS, Thermal, ThermalError, gray};
use embedded_hal::i2c::{ErrorKind, ErrorType, I2c, NoAcknowledgeSource, Operation};

use crate::Failure::{self, Broken};
use crate::report::Fingerprint;

/// Pictures that are asked for.
const PICTURES: u16 = 24;
/// One that the sensor finds out of range, and one during which the bus fails.
const RANGE: u16 = 7;
const UNPLUGGED: u16 = 13;
/// What is black and what is white, in °C.
const BLACK: i16 = 10;
const WHITE: i16 = 40;

const STATUS: u8 = 0x04;
const FIRST_PIXEL: usize = 0x80;

/// A warm body that passes a cool wall, in the sensor's steps; colder than 0 °C in a corner.
fn scene(picture: u16, pixel: usize) -> i16 {
    let (x, y) = (pixel % 8, pixel / 8);
    let distance = x.abs_diff(usize::from(picture) % 8) + y.abs_diff(4);
    let body = (60 - 20 * distance as i16).max(0);
    let wall = 17 * STEPS + (x * y) as i16;
    if pixel == 0 { -3 } else { wall + body }
}

/// The sensor's side of the bus.
struct GridEye {
    registers: [u8; 256],
    /// The register that is read next.
    at: u8,
    picture: u16,
}

impl GridEye {
    fn show(&mut self, picture: u16) {
        self.picture = picture;
        self.registers[usize::from(STATUS)] = if picture == RANGE { 0b0100 } else { 0 };
        for pixel in 0..PIXELS {
            // The four bits above the sign are not defined.
            let raw = scene(picture, pixel) & 0x0FFF | (picture as i16 & 1) << 12;
            let at = FIRST_PIXEL + 2 * pixel;
            self.registers[at..at + 2].copy_from_slice(&raw.to_le_bytes());
        }
    }
}

/// The driver's side of it.
struct Wire<'a>(&'a RefCell<GridEye>);

impl ErrorType for Wire<'_> {
    type Error = ErrorKind;
}

impl I2c for Wire<'_> {
    fn transaction(&mut self, address: u8, all: &mut [Operation<'_>]) -> Result<(), ErrorKind> {
        let mut sensor = self.0.borrow_mut();
        if address != ADDRESS || sensor.picture == UNPLUGGED {
            return Err(ErrorKind::NoAcknowledge(NoAcknowledgeSource::Address));
        }
        for operation in all {
            match operation {
                Operation::Write([register]) => sensor.at = *register,
                Operation::Write([register, value]) => {
                    sensor.registers[usize::from(*register)] = *value;
                }
                Operation::Write(_) => return Err(ErrorKind::Other),
                Operation::Read(out) => {
                    for byte in out.iter_mut() {
                        *byte = sensor.registers[usize::from(sensor.at)];
                        sensor.at = sensor.at.wrapping_add(1);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Prints how many pictures were read and the fingerprint of their pixels.
#[inline(never)] // See `crate::run`.
pub(crate) fn run(out: &mut impl Write) -> Result<(), Failure> {
    let grid_eye = RefCell::new(GridEye {
        registers: [0; 256],
        at: 0,
        picture: 0,
    });
    let mut sensor = Thermal::start(Wire(&grid_eye), ADDRESS, Rate::Ten)
        .map_err(|_| Broken("the thermal sensor does not start"))?;
    let mut all = Fingerprint::new();
    let (mut read, mut warmest) = (0, i16::MIN);
    for picture in 0..PICTURES {
        grid_eye.borrow_mut().show(picture);
        let mut steps = [0; PIXELS];
        match sensor.read(&mut steps) {
            Ok(()) => {
                if steps != core::array::from_fn(|pixel| scene(picture, pixel)) {
                    return Err(Broken("the thermal sensor is read wrongly"));
                }
                read += 1;
                warmest = steps.into_iter().fold(warmest, i16::max);
                for pixel in gray(&steps, BLACK * STEPS, WHITE * STEPS) {
                    all.add(u32::from(pixel));
                }
            }
            Err(error @ ThermalError::Range) if picture == RANGE => {
                writeln!(out, "sensor: picture {picture}: {error}")?;
            }
            Err(error @ ThermalError::Bus(_)) if picture == UNPLUGGED => {
                writeln!(out, "sensor: picture {picture}: {error}")?;
            }
            Err(_) => return Err(Broken("the thermal sensor fails")),
        }
    }
    writeln!(
        out,
        "sensor: {read} of {PICTURES} pictures, at most {warmest} quarters of a degree, fingerprint {all}"
    )?;
    Ok(())
}
