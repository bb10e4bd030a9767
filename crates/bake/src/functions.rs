//! The functions that every definition may call: those of HCL's usual library, and a few for paths,
//! addresses, digests, ids and times.

mod format;
mod ids;
mod lists;
mod math;
mod network;
mod texts;
mod times;

use std::{collections::HashMap, sync::LazyLock};

use crate::{
    Host,
    convert::convert,
    number::Number,
    problem::Problem,
    value::{Type, Value},
};

/// Why a call failed.
#[derive(Debug)]
pub(crate) struct CallError {
    /// The argument that it is about, from 0.
    pub(crate) argument: Option<usize>,
    /// It is the call that is wrong, not what it calculates.
    shape: bool,
    why: String,
}

impl CallError {
    fn argument(n: usize, why: impl Into<String>) -> Self {
        Self { argument: Some(n), shape: false, why: why.into() }
    }

    pub(crate) fn into_problem(self, function: &str) -> Box<Problem> {
        match (self.shape, self.argument) {
            (true, _) => Problem::new("Wrong number of function arguments", self.why),
            (false, Some(n)) => Problem::new(
                "Invalid function argument",
                format!("Invalid value for argument {} of {function}: {}.", n + 1, self.why),
            ),
            (false, None) => Problem::new(
                "Error in function call",
                format!("Call to function {function:?} failed: {}.", self.why),
            ),
        }
    }
}

impl From<String> for CallError {
    fn from(why: String) -> Self {
        Self { argument: None, shape: false, why }
    }
}

impl From<&str> for CallError {
    fn from(why: &str) -> Self {
        why.to_owned().into()
    }
}

pub(crate) use texts::{encode, value_of};

type Result<T, E = CallError> = std::result::Result<T, E>;

/// Arguments that have the types that the function wants.
struct Args<'c> {
    host: &'c dyn Host,
    values: Vec<Value>,
}

impl Args<'_> {
    fn text(&self, n: usize) -> Result<&str> {
        self.values
            .get(n)
            .and_then(Value::as_str)
            .ok_or_else(|| CallError::argument(n, "string required"))
    }

    fn number(&self, n: usize) -> Result<Number> {
        match self.values.get(n) {
            Some(Value::Number(number)) => Ok(*number),
            _ => Err(CallError::argument(n, "a number is required")),
        }
    }

    fn whole(&self, n: usize) -> Result<i64> {
        self.number(n)?.to_i64().ok_or_else(|| {
            CallError::argument(n, "value must be a whole number, between -9223372036854775808 and 9223372036854775807 inclusive")
        })
    }

    fn bool(&self, n: usize) -> Result<bool> {
        match self.values.get(n) {
            Some(Value::Bool(b)) => Ok(*b),
            _ => Err(CallError::argument(n, "a bool is required")),
        }
    }

    fn value(&self, n: usize) -> Result<&Value> {
        self.values.get(n).ok_or_else(|| CallError::argument(n, "is missing"))
    }

    /// The elements of a list, set or tuple.
    fn items(&self, n: usize) -> Result<&[Value]> {
        let items = self.value(n)?.sequence();
        items.map(|i| i.as_slice()).ok_or_else(|| CallError::argument(n, "a list is required"))
    }

    /// The texts of a list of texts.
    fn texts(&self, n: usize) -> Result<Vec<&str>> {
        let each = self.items(n)?.iter().enumerate().map(|(i, v)| {
            v.as_str().ok_or_else(|| CallError::argument(n, format!("element {i} is null")))
        });
        each.collect()
    }
}

/// What an argument has to be.
#[derive(Clone, Copy, Debug)]
enum Param {
    Text,
    Number,
    Bool,
    Any,
    /// Also null.
    Nullable,
    Texts,
    List,
    Set,
}

impl Param {
    fn ty(self) -> Type {
        match self {
            Self::Text => Type::String,
            Self::Number => Type::Number,
            Self::Bool => Type::Bool,
            Self::Any | Self::Nullable => Type::Dynamic,
            Self::Texts => Type::list(Type::String),
            Self::List => Type::list(Type::Dynamic),
            Self::Set => Type::set(Type::Dynamic),
        }
    }
}

struct Function {
    params: &'static [Param],
    rest: Option<Param>,
    call: fn(&Args<'_>) -> Result<Value>,
}

type Entry = (&'static str, &'static [Param], Option<Param>, fn(&Args<'_>) -> Result<Value>);

static TABLE: LazyLock<HashMap<&'static str, Function>> = LazyLock::new(|| {
    [
        texts::TABLE,
        lists::TABLE,
        math::TABLE,
        network::TABLE,
        ids::TABLE,
        times::TABLE,
        format::TABLE,
    ]
    .into_iter()
    .flatten()
    .map(|&(name, params, rest, call)| (name, Function { params, rest, call }))
    .collect()
});

/// Functions that the evaluator has itself, since they look at expressions.
const SPECIAL: [&str; 3] = ["can", "convert", "try"];

/// Whether there is a function `name`.
pub(crate) fn exists(name: &str) -> bool {
    TABLE.contains_key(name) || SPECIAL.contains(&name)
}

/// All of them.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    TABLE.keys().copied().chain(SPECIAL)
}

/// Calls the function `name`.
pub(crate) fn call(host: &dyn Host, name: &str, values: &[Value]) -> Result<Value> {
    let function = TABLE.get(name).ok_or("there is no such function")?;
    let shape = |why| CallError { argument: None, shape: true, why };
    if values.len() < function.params.len() {
        let least = if function.rest.is_some() { " at least" } else { "" };
        return Err(shape(format!(
            "Function {name:?} expects{least} {} argument(s), and has {}.",
            function.params.len(),
            values.len()
        )));
    }
    if values.len() > function.params.len() && function.rest.is_none() {
        return Err(shape(format!(
            "Function {name:?} expects only {} argument(s).",
            function.params.len()
        )));
    }
    let params = function
        .params
        .iter()
        .copied()
        .chain(std::iter::repeat_with(|| function.rest.unwrap_or(Param::Any)));
    let mut converted = Vec::with_capacity(values.len());
    for (n, (value, param)) in values.iter().zip(params).enumerate() {
        if value.is_null() && !matches!(param, Param::Nullable) {
            return Err(CallError::argument(n, "argument must not be null"));
        }
        converted.push(convert(value, &param.ty()).map_err(|e| CallError::argument(n, e))?);
    }
    (function.call)(&Args { host, values: converted })
}

#[cfg(test)]
mod tests {
    use crate::tests::Nowhere;

    /// Evaluates `expression` and shows it as JSON.
    #[track_caller]
    pub(super) fn check(expression: &str, expected: &str) {
        let shown = crate::tests::evaluate(&Nowhere, expression);
        assert_eq!(shown, expected, "{expression}");
    }

    #[test]
    fn arguments_are_counted_and_converted() {
        check("upper(1)", r#""1""#);
        check(
            "upper()",
            "error Wrong number of function arguments; Function \"upper\" expects 1 argument(s), and has 0.",
        );
        check(
            "upper(null)",
            "error Invalid function argument; Invalid value for argument 1 of upper: argument must not be null.",
        );
        check(
            "uper(1)",
            "error Call to unknown function; There is no function named \"uper\". Did you mean \"upper\"?",
        );
        check("max([1, 2, 3]...)", "3");
        check("try(nothing.at.all, \"x\")", r#""x""#);
        check("can(nothing)", "false");
        check("convert([\"1\"], list(number))", "[1]");
    }
}
