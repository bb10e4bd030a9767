//! What operators, indexes and `for` do with values.

use hcl_edit::expr::BinaryOperator;

use crate::{
    convert::convert,
    number::{self, Number},
    problem::{Outcome, Problem},
    value::{Type, Value},
};

/// Keys and values of what can be gone through.
pub(crate) fn entries(collection: &Value) -> Outcome<Vec<(Value, Value)>> {
    if collection.is_null() {
        return Err(Problem::new(
            "Iteration over null value",
            "A null value cannot be used as the collection in a 'for' expression.",
        ));
    }
    if let Some(fields) = collection.mapping() {
        return Ok(fields.iter().map(|(k, v)| (Value::string(k.as_str()), v.clone())).collect());
    }
    match collection {
        Value::Set(_, items) => Ok(items.iter().map(|v| (v.clone(), v.clone())).collect()),
        _ => match collection.sequence() {
            Some(items) => {
                let numbered = items.iter().enumerate();
                Ok(numbered.map(|(n, v)| (Value::Number(n.into()), v.clone())).collect())
            }
            None => Err(Problem::new(
                "Iteration over non-iterable value",
                format!(
                    "A value of type {} cannot be used as the collection in a 'for' expression.",
                    collection.ty()
                ),
            )),
        },
    }
}

/// The attribute `name` of an object or map.
pub(crate) fn attribute(value: &Value, name: &str) -> Outcome<Value> {
    const HEADING: &str = "Unsupported attribute";
    match value {
        Value::Null(_) => Err(Problem::new(
            "Attempt to get attribute from null value",
            "This value is null, so it does not have any attributes.",
        )),
        Value::Object(fields) => fields.get(name).cloned().ok_or_else(|| {
            Problem::new(HEADING, format!("This object does not have an attribute named {name:?}."))
        }),
        Value::Map(_, fields) => fields.get(name).cloned().ok_or_else(|| {
            Problem::new(
                "Missing map element",
                format!("This map does not have an element with the key {name:?}."),
            )
        }),
        Value::List(..) | Value::Tuple(_) | Value::Set(..) => Err(Problem::new(
            HEADING,
            format!(
                "Can't access attributes on a {}. Did you mean to access an attribute across all elements?",
                value.ty()
            ),
        )),
        _ => Err(Problem::new(
            HEADING,
            format!("Can't access attributes on a primitive-typed value ({}).", value.ty()),
        )),
    }
}

/// The element of `collection` under `key`.
pub(crate) fn index(collection: &Value, key: &Value) -> Outcome<Value> {
    const HEADING: &str = "Invalid index";
    const NONE: &str = "The given key does not identify an element in this collection value";
    if collection.is_null() {
        return Err(Problem::new(
            "Attempt to index null value",
            "This value is null, so it does not have any indices.",
        ));
    }
    if key.is_null() {
        return Err(Problem::new(HEADING, "Can't use a null value as an indexing key."));
    }
    let bad_key = |e: String| {
        Problem::new(
            HEADING,
            format!("The given key does not identify an element in this collection value: {e}."),
        )
    };
    match collection {
        Value::Map(_, fields) | Value::Object(fields) => {
            let key = convert(key, &Type::String).map_err(bad_key)?;
            let found = key.as_str().and_then(|key| fields.get(key));
            found.cloned().ok_or_else(|| Problem::new(HEADING, format!("{NONE}.")))
        }
        Value::List(_, items) | Value::Tuple(items) => {
            let key = convert(key, &Type::Number).map_err(bad_key)?;
            let Value::Number(n) = key else { return Err(bad_key("number required".into())) };
            if n.is_negative() {
                let why = "a negative number is not a valid index for a sequence";
                return Err(Problem::new(HEADING, format!("{NONE}: {why}.")));
            }
            let Some(n) = n.to_whole() else {
                let why = "indexing a sequence requires a whole number, but the given index has a fractional part";
                return Err(Problem::new(HEADING, format!("{NONE}: {why}.")));
            };
            let found = usize::try_from(n).ok().and_then(|n| items.get(n));
            found.cloned().ok_or_else(|| {
                let why = match items.is_empty() {
                    true => "the collection has no elements",
                    false => {
                        "the given index is greater than or equal to the length of the collection"
                    }
                };
                Problem::new(HEADING, format!("{NONE}: {why}."))
            })
        }
        Value::Set(..) => Err(Problem::new(
            HEADING,
            "Elements of a set are identified only by their value and don't have any separate index or key to select with, so it's only possible to perform operations across all elements of the set.",
        )),
        _ => Err(Problem::new(HEADING, "This value does not have any indices.")),
    }
}

fn operand(value: &Value, ty: &Type) -> Outcome<Value> {
    const HEADING: &str = "Invalid operand";
    if value.is_null() {
        return Err(Problem::new(
            HEADING,
            "Unsuitable value for operand: argument must not be null.",
        ));
    }
    convert(value, ty)
        .map_err(|e| Problem::new(HEADING, format!("Unsuitable value for operand: {e}.")))
}

/// An operand that has to be a number.
pub(crate) fn number_of(value: &Value) -> Outcome<Number> {
    match operand(value, &Type::Number)? {
        Value::Number(n) => Ok(n),
        _ => Err(Problem::new("Invalid operand", "a number is required")),
    }
}

/// An operand that has to be true or false.
pub(crate) fn bool_of(value: &Value) -> Outcome<bool> {
    match operand(value, &Type::Bool)? {
        Value::Bool(b) => Ok(b),
        _ => Err(Problem::new("Invalid operand", "a bool is required")),
    }
}

/// `left operator right`.
pub(crate) fn binary(operator: BinaryOperator, left: &Value, right: &Value) -> Outcome<Value> {
    use BinaryOperator as Op;
    let number = |calculate: fn(Number, Number) -> Option<Number>| {
        let (a, b) = (number_of(left)?, number_of(right)?);
        calculate(a, b).map(Value::Number).ok_or_else(|| {
            match matches!(operator, Op::Div | Op::Mod) && b.is_zero() {
                true => Problem::new("Division by zero", "Cannot divide by zero."),
                false => Problem::new("Operation failed", number::RANGE),
            }
        })
    };
    let ordered = |wanted: fn(std::cmp::Ordering) -> bool| {
        Ok(Value::Bool(wanted(number_of(left)?.cmp(&number_of(right)?))))
    };
    match operator {
        Op::Eq => Ok(Value::Bool(left.equals(right))),
        Op::NotEq => Ok(Value::Bool(!left.equals(right))),
        Op::Less => ordered(std::cmp::Ordering::is_lt),
        Op::LessEq => ordered(std::cmp::Ordering::is_le),
        Op::Greater => ordered(std::cmp::Ordering::is_gt),
        Op::GreaterEq => ordered(std::cmp::Ordering::is_ge),
        Op::Plus => number(Number::add),
        Op::Minus => number(Number::subtract),
        Op::Mul => number(Number::multiply),
        Op::Div => number(Number::divide),
        Op::Mod => number(Number::remainder),
        Op::And => Ok(Value::Bool(bool_of(left)? & bool_of(right)?)),
        Op::Or => Ok(Value::Bool(bool_of(left)? | bool_of(right)?)),
    }
}
