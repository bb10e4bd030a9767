//! Numbers and truth.

use super::{
    Args, CallError, Entry,
    Param::{Any, Bool, Number as Num},
    Result,
};
use crate::{
    number::{self, Number},
    value::Value,
};

fn number(n: Option<Number>) -> Result<Value> {
    Ok(Value::Number(n.ok_or(number::RANGE)?))
}

fn float(n: f64) -> Result<Value> {
    number(Number::from_f64(n))
}

fn bool(b: bool) -> Result<Value> {
    Ok(Value::Bool(b))
}

pub(super) static TABLE: &[Entry] = &[
    ("absolute", &[Num], None, |a| {
        let n = a.number(0)?;
        number(Some(if n.is_negative() { n.negate() } else { n }))
    }),
    ("add", &[Num, Num], None, |a| number(a.number(0)?.add(a.number(1)?))),
    ("and", &[Bool, Bool], None, |a| bool(a.bool(0)? && a.bool(1)?)),
    ("ceil", &[Num], None, |a| number(Some(a.number(0)?.ceil()))),
    ("divide", &[Num, Num], None, |a| {
        let by = a.number(1)?;
        if by.is_zero() {
            return Err("can't divide by zero".into());
        }
        number(a.number(0)?.divide(by))
    }),
    ("floor", &[Num], None, |a| number(Some(a.number(0)?.floor()))),
    ("greaterthan", &[Num, Num], None, |a| bool(a.number(0)? > a.number(1)?)),
    ("greaterthanorequalto", &[Num, Num], None, |a| bool(a.number(0)? >= a.number(1)?)),
    ("int", &[Num], None, |a| number(Some(a.number(0)?.truncate()))),
    ("lessthan", &[Num, Num], None, |a| bool(a.number(0)? < a.number(1)?)),
    ("lessthanorequalto", &[Num, Num], None, |a| bool(a.number(0)? <= a.number(1)?)),
    ("log", &[Num, Num], None, |a| float(a.number(0)?.to_f64().ln() / a.number(1)?.to_f64().ln())),
    ("max", &[], Some(Num), |a| all(a)?.into_iter().max().map_or_else(none, |n| number(Some(n)))),
    ("min", &[], Some(Num), |a| all(a)?.into_iter().min().map_or_else(none, |n| number(Some(n)))),
    ("modulo", &[Num, Num], None, |a| {
        let by = a.number(1)?;
        if by.is_zero() {
            return number(Some(a.number(0)?));
        }
        number(a.number(0)?.remainder(by))
    }),
    ("multiply", &[Num, Num], None, |a| number(a.number(0)?.multiply(a.number(1)?))),
    ("negate", &[Num], None, |a| number(Some(a.number(0)?.negate()))),
    ("not", &[Bool], None, |a| bool(!a.bool(0)?)),
    ("or", &[Bool, Bool], None, |a| bool(a.bool(0)? || a.bool(1)?)),
    ("parseint", &[Any, Num], None, |a| {
        let Value::String(text) = a.value(0)? else {
            let why = format!("first argument must be a string, not {}", a.value(0)?.ty());
            return Err(CallError::argument(0, why));
        };
        let base =
            u32::try_from(a.whole(1)?).ok().filter(|b| (2..=36).contains(b)).ok_or_else(|| {
                CallError::argument(1, "base must be a whole number between 2 and 36 inclusive")
            })?;
        let parsed = i128::from_str_radix(text, base).map_err(|_| {
            CallError::argument(0, format!("cannot parse {text:?} as a base {base} integer"))
        })?;
        number(Some(Number::whole(parsed)))
    }),
    ("pow", &[Num, Num], None, |a| float(a.number(0)?.to_f64().powf(a.number(1)?.to_f64()))),
    ("signum", &[Num], None, |a| number(Some(a.whole(0)?.signum().into()))),
    ("subtract", &[Num, Num], None, |a| number(a.number(0)?.subtract(a.number(1)?))),
];

fn all(args: &Args<'_>) -> Result<Vec<Number>> {
    (0..args.values.len()).map(|n| args.number(n)).collect()
}

fn none() -> Result<Value> {
    Err("must pass at least one number".into())
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;

    #[test]
    fn numbers_are_calculated() {
        check("add(0.1, 0.2)", "0.3");
        check("divide(7, 2)", "3.5");
        check("modulo(7, 3)", "1");
        check("max(1, 3, 2)", "3");
        check("min(1, \"-3\")", "-3");
        check("pow(2, 10)", "1024");
        check("log(8, 2)", "3");
        check("ceil(1.2)", "2");
        check("floor(-1.2)", "-2");
        check("int(-1.7)", "-1");
        check("parseint(\"ff\", 16)", "255");
        check("signum(-4)", "-1");
        check("absolute(-1.5)", "1.5");
        check("and(true, or(false, not(false)))", "true");
        check(
            "min()",
            "error Error in function call; Call to function \"min\" failed: must pass at least one number.",
        );
    }
}
