//! A sensor through `embedded-hal`: Panasonic's Grid-EYE AMG8833, 8 × 8 pixels of temperature over
//! I²C, and its pictures as the gray frames that everything else takes.
//!
//! Registers after Panasonic, "Infrared Array Sensor Grid-EYE (AMG88)", reference
//! specification: power control 0x00, reset 0x01, frame rate 0x02, status 0x04, status clear 0x05, pixels
//! from 0x80 on, 12 bits of two's complement each, little endian, in steps of 0.25 °C.

use core::fmt;

use embedded_hal::i2c::{ErrorKind, I2c};

/// Pixels along a side.
pub const SIDE: usize = 8;
/// Pixels of a picture.
pub const PIXELS: usize = SIDE * SIDE;
/// Address with the pin AD_SELECT low.
pub const ADDRESS: u8 = 0x68;
/// Steps of a pixel in one degree Celsius.
pub const STEPS: i16 = 4;

const POWER: u8 = 0x00;
const RESET: u8 = 0x01;
const RATE: u8 = 0x02;
const STATUS: u8 = 0x04;
const CLEAR: u8 = 0x05;
const FIRST_PIXEL: u8 = 0x80;

const POWER_NORMAL: u8 = 0x00;
const RESET_INITIAL: u8 = 0x3F;
/// Status bits: a pixel, or the reference thermistor, is out of range.
const OVERFLOW: u8 = 0b1100;

/// Pictures a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// 10.
    Ten,
    /// 1, less noisy.
    One,
}

/// Why there is no picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThermalError {
    /// The bus failed: check the wiring and the address.
    Bus(ErrorKind),
    /// The sensor says that a temperature is out of its range, 0 to 80 °C.
    Range,
}

impl fmt::Display for ThermalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bus(kind) => write!(
                f,
                "thermal sensor: {kind}; check the wiring and the address"
            ),
            Self::Range => f.write_str("thermal sensor: a temperature is outside 0 to 80 °C"),
        }
    }
}

impl core::error::Error for ThermalError {}

/// The sensor on a bus.
#[derive(Debug)]
pub struct Thermal<I> {
    bus: I,
    address: u8,
}

impl<I: I2c> Thermal<I> {
    /// Wakes the sensor and resets it. Its first picture is there after two periods of `rate`.
    ///
    /// # Errors
    /// [`ThermalError::Bus`].
    pub fn start(bus: I, address: u8, rate: Rate) -> Result<Self, ThermalError> {
        let mut sensor = Self { bus, address };
        sensor.write(POWER, POWER_NORMAL)?;
        sensor.write(RESET, RESET_INITIAL)?;
        sensor.write(RATE, u8::from(rate == Rate::One))?;
        Ok(sensor)
    }

    /// Reads a picture, row by row, in steps of 1/[`STEPS`] °C.
    ///
    /// # Errors
    /// [`ThermalError::Bus`]; [`ThermalError::Range`], after which the sensor's flag is cleared.
    pub fn read(&mut self, out: &mut [i16; PIXELS]) -> Result<(), ThermalError> {
        let mut status = [0];
        self.fetch(STATUS, &mut status)?;
        if status[0] & OVERFLOW != 0 {
            self.write(CLEAR, OVERFLOW)?;
            return Err(ThermalError::Range);
        }
        let mut raw = [0; 2 * PIXELS];
        self.fetch(FIRST_PIXEL, &mut raw)?;
        let (pairs, _) = raw.as_chunks::<2>();
        for (pixel, pair) in out.iter_mut().zip(pairs) {
            // The sign is bit 11; the four bits above it are not defined.
            *pixel = (i16::from_le_bytes(*pair) << 4) >> 4;
        }
        Ok(())
    }

    /// The bus, for another use.
    pub fn release(self) -> I {
        self.bus
    }

    fn write(&mut self, register: u8, value: u8) -> Result<(), ThermalError> {
        self.bus
            .write(self.address, &[register, value])
            .map_err(bus_error)
    }

    fn fetch(&mut self, register: u8, out: &mut [u8]) -> Result<(), ThermalError> {
        self.bus
            .write_read(self.address, &[register], out)
            .map_err(bus_error)
    }
}

fn bus_error(error: impl embedded_hal::i2c::Error) -> ThermalError {
    ThermalError::Bus(error.kind())
}

/// A picture as gray pixels: `low` steps and less are 0, `high` steps and more are 255, linear in
/// between. The range is fixed and not each picture's own, so that a model sees the same thing at
/// the same brightness. If `high` is not above `low`, every pixel is either 0 or 255.
pub fn gray(picture: &[i16; PIXELS], low: i16, high: i16) -> [u8; PIXELS] {
    let (low, span) = (i32::from(low), (i32::from(high) - i32::from(low)).max(1));
    picture.map(|steps| {
        let above = (i32::from(steps) - low).clamp(0, span);
        // At most 255, and rounded to the nearest.
        ((above * 255 + span / 2) / span) as u8
    })
}

#[cfg(test)]
mod tests {
    use embedded_hal_mock::eh1::i2c::{Mock, Transaction};
    use std::vec;
    use std::vec::Vec;

    use super::*;

    fn started(then: &[Transaction]) -> Vec<Transaction> {
        let mut all = vec![
            Transaction::write(ADDRESS, vec![0x00, 0x00]),
            Transaction::write(ADDRESS, vec![0x01, 0x3F]),
            Transaction::write(ADDRESS, vec![0x02, 0x00]),
        ];
        all.extend_from_slice(then);
        all
    }

    #[test]
    fn a_picture_is_read_and_its_signs_are_right() {
        let mut raw = vec![0u8; 2 * PIXELS];
        // 25 °C, −0.25 °C, −55 °C with rubbish above the sign.
        raw[..6].copy_from_slice(&[100, 0, 0xFF, 0x0F, 0x24, 0x5F]);
        let mut bus = Mock::new(&started(&[
            Transaction::write_read(ADDRESS, vec![0x04], vec![0]),
            Transaction::write_read(ADDRESS, vec![0x80], raw),
        ]));
        let mut sensor = Thermal::start(&mut bus, ADDRESS, Rate::Ten).unwrap();
        let mut picture = [9; PIXELS];
        sensor.read(&mut picture).unwrap();
        assert_eq!(picture[..4], [25 * STEPS, -1, -55 * STEPS, 0]);
        sensor.release().done();
    }

    #[test]
    fn overflow_is_an_error_once() {
        let mut bus = Mock::new(&started(&[
            Transaction::write_read(ADDRESS, vec![0x04], vec![0b0100]),
            Transaction::write(ADDRESS, vec![0x05, 0b1100]),
            Transaction::write_read(ADDRESS, vec![0x04], vec![0]),
            Transaction::write_read(ADDRESS, vec![0x80], vec![1; 2 * PIXELS]),
        ]));
        let mut sensor = Thermal::start(&mut bus, ADDRESS, Rate::Ten).unwrap();
        let mut picture = [0; PIXELS];
        assert_eq!(sensor.read(&mut picture), Err(ThermalError::Range));
        assert_eq!(sensor.read(&mut picture), Ok(()));
        sensor.release().done();
    }

    #[test]
    fn a_bus_that_fails_is_named() {
        let mut bus =
            Mock::new(&[Transaction::write(ADDRESS, vec![0x00, 0x00])
                .with_error(ErrorKind::ArbitrationLoss)]);
        let error = Thermal::start(&mut bus, ADDRESS, Rate::One).map(drop);
        assert_eq!(error, Err(ThermalError::Bus(ErrorKind::ArbitrationLoss)));
        bus.done();
    }

    #[test]
    fn gray_is_linear_and_clamped() {
        let mut picture = [0; PIXELS];
        picture[..5].copy_from_slice(&[i16::MIN, 40, 60, 80, i16::MAX]);
        assert_eq!(gray(&picture, 40, 80)[..5], [0, 0, 128, 255, 255]);
        assert_eq!(gray(&picture, 40, 40)[..5], [0, 0, 255, 255, 255]);
        assert_eq!(gray(&picture, i16::MIN, i16::MAX)[..1], [0]);
    }
}
