//! Numbers of definitions: decimals, exact as long as 38 digits are enough.
//!
//! Other programs count with binary fractions of 512 bits. Adding, multiplying and printing
//! decimals of a reasonable length makes no difference; a quotient that never ends has fewer digits
//! here.

use std::{cmp::Ordering, fmt};

/// Digits behind the point, at most.
const MAX_SCALE: u32 = 60;
/// Digits of a quotient that does not end.
const QUOTIENT_DIGITS: u32 = 34;
/// Powers of ten that a number may be written with.
const MAX_EXPONENT: i64 = 100;

/// What a calculation with no result says.
pub(crate) const RANGE: &str = "the number has too many digits";

/// A decimal number: `mantissa` divided by ten `scale` times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Number {
    mantissa: i128,
    scale: u32,
}

impl From<i64> for Number {
    fn from(n: i64) -> Self {
        Self { mantissa: i128::from(n), scale: 0 }
    }
}

impl From<usize> for Number {
    fn from(n: usize) -> Self {
        Self { mantissa: i128::try_from(n).unwrap_or(i128::MAX), scale: 0 }
    }
}

impl Number {
    pub(crate) const ZERO: Self = Self { mantissa: 0, scale: 0 };

    /// Without zeros at the end of the fraction.
    fn normal(mut mantissa: i128, mut scale: u32) -> Self {
        while scale > 0 && mantissa % 10 == 0 {
            mantissa /= 10;
            scale -= 1;
        }
        Self { mantissa, scale }
    }

    /// A whole number.
    pub(crate) fn whole(n: i128) -> Self {
        Self { mantissa: n, scale: 0 }
    }

    /// Reads a decimal number with an optional sign and exponent.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (negative, text) = match text.as_bytes().first()? {
            b'-' => (true, &text[1..]),
            b'+' => (false, &text[1..]),
            _ => (false, text),
        };
        let (digits, exponent) = match text.find(['e', 'E']) {
            Some(at) => (&text[..at], text[at + 1..].parse::<i64>().ok()?),
            None => (text, 0),
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if (whole.is_empty() && fraction.is_empty())
            || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit())
            || exponent.abs() > MAX_EXPONENT
        {
            return None;
        }
        let fraction = fraction.trim_end_matches('0');
        let mut mantissa: i128 = 0;
        for byte in whole.bytes().chain(fraction.bytes()) {
            mantissa = mantissa.checked_mul(10)?.checked_add(i128::from(byte - b'0'))?;
        }
        let scale = i64::try_from(fraction.len()).ok()? - exponent;
        let number = Self::shifted(if negative { -mantissa } else { mantissa }, scale)?;
        (number.scale <= MAX_SCALE).then_some(number)
    }

    /// `mantissa` divided by ten `scale` times, which may be fewer than none.
    fn shifted(mut mantissa: i128, mut scale: i64) -> Option<Self> {
        while scale < 0 && mantissa != 0 {
            mantissa = mantissa.checked_mul(10)?;
            scale += 1;
        }
        Some(Self::normal(mantissa, u32::try_from(scale.max(0)).ok()?))
    }

    /// The nearest decimal with as few digits as tell it from other binary fractions.
    pub(crate) fn from_f64(n: f64) -> Option<Self> {
        n.is_finite().then(|| Self::parse(&format!("{n:e}")))?
    }

    pub(crate) fn to_f64(self) -> f64 {
        self.to_string().parse().unwrap_or(f64::NAN)
    }

    /// The number if it is whole.
    pub(crate) fn to_whole(self) -> Option<i128> {
        (self.scale == 0).then_some(self.mantissa)
    }

    /// The number if it is whole and not too large.
    pub(crate) fn to_i64(self) -> Option<i64> {
        self.to_whole().and_then(|n| n.try_into().ok())
    }

    pub(crate) fn is_negative(self) -> bool {
        self.mantissa < 0
    }

    pub(crate) fn is_zero(self) -> bool {
        self.mantissa == 0
    }

    /// Both with the same scale.
    fn aligned(self, other: Self) -> Option<(i128, i128, u32)> {
        let scale = self.scale.max(other.scale);
        let up = |n: Self| n.mantissa.checked_mul(10i128.checked_pow(scale - n.scale)?);
        Some((up(self)?, up(other)?, scale))
    }

    pub(crate) fn add(self, other: Self) -> Option<Self> {
        let (a, b, scale) = self.aligned(other)?;
        Some(Self::normal(a.checked_add(b)?, scale))
    }

    pub(crate) fn negate(self) -> Self {
        Self { mantissa: self.mantissa.saturating_neg(), ..self }
    }

    pub(crate) fn subtract(self, other: Self) -> Option<Self> {
        self.add(other.negate())
    }

    /// One digit less behind the point.
    fn shorter(self) -> Option<Self> {
        let scale = self.scale.checked_sub(1)?;
        let rounded = self.mantissa / 10 + (self.mantissa % 10) / 5;
        Some(Self { mantissa: rounded, scale })
    }

    pub(crate) fn multiply(self, other: Self) -> Option<Self> {
        let (mut a, mut b) = (self, other);
        loop {
            if let Some(mantissa) = a.mantissa.checked_mul(b.mantissa) {
                let mut product = Self::normal(mantissa, a.scale + b.scale);
                while product.scale > MAX_SCALE {
                    product = product.shorter()?;
                }
                return Some(product);
            }
            // The longer one has digits to lose.
            if a.mantissa.abs() < b.mantissa.abs() && b.scale > 0 || a.scale == 0 {
                (a, b) = (b, a);
            }
            a = a.shorter()?;
        }
    }

    /// `None` for what is divided by zero, too.
    pub(crate) fn divide(self, other: Self) -> Option<Self> {
        let (a, b) = (self.mantissa, other.mantissa);
        let (mut quotient, mut rest) = (a.checked_div(b)?, a.checked_rem(b)?);
        let mut scale = i64::from(self.scale) - i64::from(other.scale);
        let mut digits = quotient.unsigned_abs().checked_ilog10().map_or(0, |n| n + 1);
        while rest != 0 && digits < QUOTIENT_DIGITS && scale < i64::from(MAX_SCALE) {
            let Some(more) = rest.checked_mul(10) else { break };
            quotient = quotient.checked_mul(10)?.checked_add(more / b)?;
            rest = more % b;
            scale += 1;
            digits += u32::from(digits > 0 || quotient != 0);
        }
        Self::shifted(quotient, scale)
    }

    /// What is left of an integer division, with the sign of what is divided.
    pub(crate) fn remainder(self, other: Self) -> Option<Self> {
        let (a, b, scale) = self.aligned(other)?;
        Some(Self::normal(a.checked_rem(b)?, scale))
    }

    /// Without the fraction.
    pub(crate) fn truncate(self) -> Self {
        let power = 10i128.checked_pow(self.scale);
        Self::whole(power.map_or(0, |power| self.mantissa / power))
    }

    pub(crate) fn floor(self) -> Self {
        let whole = self.truncate();
        if self.mantissa < 0 && whole != self { Self::whole(whole.mantissa - 1) } else { whole }
    }

    pub(crate) fn ceil(self) -> Self {
        self.negate().floor().negate()
    }

    /// In scientific notation where the exponent is below -4 or above 5: Go's `%g` without a
    /// precision.
    pub(crate) fn general(self) -> String {
        let digits = self.mantissa.unsigned_abs().to_string();
        let trimmed = digits.trim_end_matches('0');
        if trimmed.is_empty() {
            return "0".into();
        }
        let exponent = i64::try_from(digits.len()).unwrap_or(i64::MAX) - 1 - i64::from(self.scale);
        if (-4..6).contains(&exponent) {
            return self.to_string();
        }
        let sign = if self.mantissa < 0 { "-" } else { "" };
        let (first, rest) = trimmed.split_at(1);
        let point = if rest.is_empty() { "" } else { "." };
        let direction = if exponent < 0 { '-' } else { '+' };
        format!("{sign}{first}{point}{rest}e{direction}{:02}", exponent.abs())
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.scale == 0 {
            return write!(f, "{}", self.mantissa);
        }
        let scale = self.scale as usize;
        let digits = format!("{:0>1$}", self.mantissa.unsigned_abs(), scale + 1);
        let (whole, fraction) = digits.split_at(digits.len() - scale);
        write!(f, "{}{whole}.{fraction}", if self.mantissa < 0 { "-" } else { "" })
    }
}

impl PartialOrd for Number {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Number {
    fn cmp(&self, other: &Self) -> Ordering {
        match self.aligned(*other) {
            Some((a, b, _)) => a.cmp(&b),
            // Only magnitudes that are far apart cannot be aligned.
            None => self.to_f64().total_cmp(&other.to_f64()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n(text: &str) -> Number {
        Number::parse(text).unwrap()
    }

    #[test]
    fn decimals_are_exact() {
        assert_eq!(n("0.1").add(n("0.2")).unwrap().to_string(), "0.3");
        assert_eq!(n("1e3").to_string(), "1000");
        assert_eq!(n("100000000000000000000000").to_string(), "100000000000000000000000");
        assert_eq!(n("7").divide(n("2")).unwrap().to_string(), "3.5");
        assert_eq!(n("-7").remainder(n("3")).unwrap().to_string(), "-1");
        assert_eq!(n("1").divide(n("3")).unwrap().to_string(), format!("0.{}", "3".repeat(34)));
        assert_eq!(n("1").divide(n("0")), None);
        assert_eq!(n("-1.5").floor().to_string(), "-2");
        assert_eq!(n("-1.5").ceil().to_string(), "-1");
        assert_eq!(n("1.50"), n("1.5"));
        assert!(n("0.5") < n("1") && n("-2") < n("-1.5"));
    }

    #[test]
    fn what_is_no_number_or_has_too_many_digits_is_none() {
        for text in ["", "-", ".", "1_000", "0x10", "1e", "1e999", "inf", "NaN", "1.2.3"] {
            assert_eq!(Number::parse(text), None, "{text}");
        }
        assert_eq!(Number::parse(&"9".repeat(60)), None);
        let large = n(&"9".repeat(30));
        assert_eq!(large.multiply(large), None);
    }

    #[test]
    fn general_notation_is_that_of_go() {
        for (text, shown) in [
            ("0", "0"),
            ("12", "12"),
            ("1000000", "1e+06"),
            ("123456789", "1.23456789e+08"),
            ("0.0001", "0.0001"),
            ("0.00001", "1e-05"),
            ("-1.5", "-1.5"),
        ] {
            assert_eq!(n(text).general(), shown, "{text}");
        }
    }
}
