//! Lists, maps and sets.

use std::collections::BTreeMap;

use super::{
    Args, CallError, Entry,
    Param::{Any, List, Nullable, Number as Num, Set, Text, Texts},
    Result,
};
use crate::{
    convert::{convert, unify},
    number::Number,
    operations::index,
    value::{Type, Value},
};

/// Elements of a list that a function makes of a few, at most.
const MAX_ELEMENTS: usize = 1 << 16;
/// Numbers of a range, at most, as in other programs.
const MAX_RANGE: usize = 1024;

pub(super) static TABLE: &[Entry] = &[
    ("chunklist", &[List, Num], None, |a| {
        let size = usize::try_from(a.whole(1)?)
            .map_err(|_| CallError::argument(1, "the size argument must be positive"))?;
        let (items, ty) = (a.items(0)?, a.value(0)?.ty());
        let of = ty.element().cloned().unwrap_or(Type::Dynamic);
        let chunks = match size {
            _ if items.is_empty() => Vec::new(),
            0 => vec![a.value(0)?.clone()],
            n => items.chunks(n).map(|c| Value::list(of.clone(), c.to_vec())).collect(),
        };
        Ok(Value::list(ty, chunks))
    }),
    ("coalesce", &[], Some(Nullable), |a| {
        let types: Vec<Type> = a.values.iter().map(Value::ty).collect();
        let ty = unify(&types, true).ok_or("all arguments must have the same type")?;
        let found = a.values.iter().find(|v| !v.is_null()).ok_or("no non-null arguments")?;
        Ok(convert(found, &ty)?)
    }),
    ("coalescelist", &[], Some(Nullable), |a| {
        for (n, value) in a.values.iter().enumerate() {
            match value {
                Value::Null(_) => {}
                Value::List(_, items) | Value::Tuple(items) => {
                    if !items.is_empty() {
                        return Ok(value.clone());
                    }
                }
                _ => {
                    return Err(CallError::argument(
                        n,
                        "coalescelist arguments must be lists or tuples",
                    ));
                }
            }
        }
        Err("no non-null arguments".into())
    }),
    ("compact", &[Texts], None, |a| {
        let kept = a.items(0)?.iter().filter_map(Value::as_str).filter(|s| !s.is_empty());
        Ok(Value::strings(kept))
    }),
    ("concat", &[], Some(Any), concat),
    ("contains", &[Any, Nullable], None, |a| {
        let items = a.value(0)?.sequence().ok_or("argument must be list, tuple, or set")?;
        let wanted = a.value(1)?;
        Ok(Value::Bool(items.iter().any(|v| v.equals(wanted))))
    }),
    ("distinct", &[List], None, |a| {
        let items = a.items(0)?;
        if items.len() > MAX_ELEMENTS {
            return Err("the list has too many elements".into());
        }
        let mut kept: Vec<Value> = Vec::new();
        for item in items {
            if !kept.iter().any(|k| k.equals(item)) {
                kept.push(item.clone());
            }
        }
        Ok(Value::list(a.value(0)?.ty().element().cloned().unwrap_or(Type::Dynamic), kept))
    }),
    ("element", &[Any, Num], None, |a| {
        let items = match a.value(0)? {
            Value::List(_, items) | Value::Tuple(items) => items,
            other => return Err(format!("cannot read elements from {}", other.ty()).into()),
        };
        if items.is_empty() {
            return Err("cannot use element function with an empty list".into());
        }
        let n = a.whole(1)?.rem_euclid(i64::try_from(items.len()).unwrap_or(i64::MAX));
        Ok(usize::try_from(n).ok().and_then(|n| items.get(n)).cloned().unwrap_or(Value::NULL))
    }),
    ("flatten", &[Any], None, |a| {
        let items = a.value(0)?.sequence().ok_or("can only flatten lists, sets and tuples")?;
        let mut out = Vec::new();
        flatten(items, &mut out)?;
        Ok(Value::tuple(out))
    }),
    ("hasindex", &[Any, Any], None, |a| match a.value(0)? {
        collection @ (Value::List(..) | Value::Tuple(_)) => Ok(Value::Bool(
            matches!(a.value(1)?, Value::Number(_)) && index(collection, a.value(1)?).is_ok(),
        )),
        collection @ Value::Map(..) => Ok(Value::Bool(
            matches!(a.value(1)?, Value::String(_)) && index(collection, a.value(1)?).is_ok(),
        )),
        _ => Err("collection must be a list, a map or a tuple".into()),
    }),
    ("index", &[Any, Any], None, |a| {
        let key = a.value(1)?;
        match (a.value(0)?, key) {
            (Value::List(..) | Value::Tuple(_), Value::Number(_))
            | (Value::Map(..), Value::String(_)) => {
                index(a.value(0)?, key).map_err(|_| "invalid index".into())
            }
            (Value::List(..), _) => Err("key for list must be number".into()),
            (Value::Tuple(_), _) => Err("key for tuple must be number".into()),
            (Value::Map(..), _) => Err("key for map must be string".into()),
            _ => Err("collection must be a list, a map or a tuple".into()),
        }
    }),
    ("indexof", &[Any, Any], None, |a| {
        let items = match a.value(0)? {
            Value::List(_, items) | Value::Tuple(items) => items,
            _ => return Err("argument must be a list or tuple".into()),
        };
        if items.is_empty() {
            return Err("cannot search an empty list".into());
        }
        let wanted = a.value(1)?;
        let found = items.iter().position(|v| v.equals(wanted)).ok_or("item not found")?;
        Ok(Value::Number(found.into()))
    }),
    ("keys", &[Any], None, |a| {
        let value = a.value(0)?;
        let fields = value
            .mapping()
            .ok_or_else(|| CallError::argument(0, "must have map or object type"))?;
        let keys = fields.keys().map(|k| Value::string(k.as_str())).collect();
        Ok(match value {
            Value::Map(..) => Value::list(Type::String, keys),
            _ => Value::tuple(keys),
        })
    }),
    ("length", &[Any], None, |a| {
        let value = a.value(0)?;
        let length = match value {
            Value::Map(_, fields) => Some(fields.len()),
            _ => value.sequence().map(|items| items.len()),
        };
        Ok(Value::Number(length.ok_or("collection must be a list, a map or a tuple")?.into()))
    }),
    ("lookup", &[Any, Text, Any], None, |a| {
        let found = |fields: &crate::value::Fields| -> Result<Option<Value>> {
            Ok(fields.get(a.text(1)?).cloned())
        };
        match a.value(0)? {
            Value::Object(fields) => Ok(found(fields)?.unwrap_or_else(|| a.values[2].clone())),
            Value::Map(of, fields) => match found(fields)? {
                Some(value) => Ok(value),
                None => convert(a.value(2)?, of).map_err(|_| {
                    CallError::argument(
                        2,
                        "the default value must have the same type as the map elements",
                    )
                }),
            },
            _ => Err(CallError::argument(0, "lookup() requires a map as the first argument")),
        }
    }),
    ("merge", &[], Some(Nullable), |a| {
        let mut merged = BTreeMap::new();
        for value in &a.values {
            match value {
                Value::Null(Type::Map(_) | Type::Object(_) | Type::Dynamic) => {}
                other => match other.mapping() {
                    Some(fields) => {
                        merged.extend(fields.iter().map(|(k, v)| (k.clone(), v.clone())));
                    }
                    None => {
                        let ty = format!("{}", other.ty());
                        return Err(format!("arguments must be maps or objects, got {ty:?}").into());
                    }
                },
            }
        }
        // Maps of one type stay a map.
        let first = a.values.first().map(Value::ty);
        Ok(match first {
            Some(Type::Map(of)) if a.values.iter().all(|v| v.ty() == Type::Map(of.clone())) => {
                Value::map((*of).clone(), merged)
            }
            _ => Value::object(merged),
        })
    }),
    ("range", &[], Some(Num), range),
    ("reverselist", &[Any], None, |a| {
        let value = a.value(0)?;
        let mut items = value
            .sequence()
            .ok_or_else(|| {
                let why = format!("can only reverse list or tuple values, not {}", value.ty());
                CallError::argument(0, why)
            })?
            .to_vec();
        items.reverse();
        Ok(match value {
            Value::List(of, _) | Value::Set(of, _) => Value::list((**of).clone(), items),
            _ => Value::tuple(items),
        })
    }),
    ("sethaselement", &[Set, Any], None, |a| {
        let wanted = a.value(1)?;
        Ok(Value::Bool(a.items(0)?.iter().any(|v| v.equals(wanted))))
    }),
    ("setintersection", &[Set], Some(Set), |a| {
        sets(a, |have, other| have.retain(|v| other.contains(v)))
    }),
    ("setproduct", &[], Some(Any), product),
    ("setsubtract", &[Set, Set], None, |a| {
        sets(a, |have, other| have.retain(|v| !other.contains(v)))
    }),
    ("setsymmetricdifference", &[Set], Some(Set), |a| {
        sets(a, |have, other| {
            let new: Vec<Value> = other.iter().filter(|v| !have.contains(v)).cloned().collect();
            have.retain(|v| !other.contains(v));
            have.extend(new);
        })
    }),
    ("setunion", &[Set], Some(Set), |a| sets(a, |have, other| have.extend_from_slice(other))),
    ("slice", &[Any, Num, Num], None, |a| {
        let (value, start, end) = (a.value(0)?, a.whole(1)?, a.whole(2)?);
        let items = match value {
            Value::List(_, items) | Value::Tuple(items) => items,
            _ => return Err(CallError::argument(0, "must be a list or tuple value")),
        };
        let checked = |n: usize, index: i64, what: &str| {
            let index = usize::try_from(index).map_err(|_| {
                CallError::argument(n, format!("{what} index must not be less than zero"))
            })?;
            match index > items.len() {
                true => Err(CallError::argument(
                    n,
                    format!("{what} index must not be greater than the length of the list"),
                )),
                false => Ok(index),
            }
        };
        let (start, end) = (checked(1, start, "start")?, checked(2, end, "end")?);
        if start > end {
            return Err(CallError::argument(1, "start index must not be greater than end index"));
        }
        let part = items[start..end].to_vec();
        Ok(match value {
            Value::List(of, _) => Value::list((**of).clone(), part),
            _ => Value::tuple(part),
        })
    }),
    ("values", &[Any], None, |a| {
        let value = a.value(0)?;
        let fields = value.mapping().ok_or("values() requires a map as the first argument")?;
        let values = fields.values().cloned().collect();
        Ok(match value {
            Value::Map(of, _) => Value::list((**of).clone(), values),
            _ => Value::tuple(values),
        })
    }),
    ("zipmap", &[Texts, Any], None, |a| {
        let keys = a.texts(0)?;
        let (of, values) = match a.value(1)? {
            Value::List(of, items) => (Some(of.clone()), items),
            Value::Tuple(items) => (None, items),
            _ => return Err("values argument must be a list or tuple value".into()),
        };
        if keys.len() != values.len() {
            return Err(format!(
                "number of keys ({}) does not match number of values ({})",
                keys.len(),
                values.len()
            )
            .into());
        }
        let fields = keys.into_iter().map(str::to_owned).zip(values.iter().cloned()).collect();
        Ok(match of {
            Some(of) => Value::map((*of).clone(), fields),
            None => Value::object(fields),
        })
    }),
    ("equal", &[Nullable, Nullable], None, |a| Ok(Value::Bool(a.value(0)?.equals(a.value(1)?)))),
    ("notequal", &[Nullable, Nullable], None, |a| {
        Ok(Value::Bool(!a.value(0)?.equals(a.value(1)?)))
    }),
];

fn flatten(items: &[Value], out: &mut Vec<Value>) -> Result<()> {
    for item in items {
        match item.sequence() {
            Some(inner) => flatten(inner, out)?,
            None => out.push(item.clone()),
        }
        if out.len() > MAX_ELEMENTS {
            return Err("the list has too many elements".into());
        }
    }
    Ok(())
}

/// Lists of types that have something in common stay a list.
fn concat(args: &Args<'_>) -> Result<Value> {
    if args.values.is_empty() {
        return Err("at least one argument is required".into());
    }
    let mut all = Vec::new();
    for (n, value) in args.values.iter().enumerate() {
        match value {
            Value::List(_, items) | Value::Tuple(items) => all.extend(items.iter().cloned()),
            other => {
                let why = format!("all arguments must be lists or tuples; got {}", other.ty());
                return Err(CallError::argument(n, why));
            }
        }
    }
    let types: Vec<Type> = args.values.iter().map(Value::ty).collect();
    if types.iter().all(|t| matches!(t, Type::List(_)))
        && let Some(Type::List(of)) = unify(&types, true)
    {
        let all: Vec<Value> = all.iter().map(|v| convert(v, &of)).collect::<Result<_, _>>()?;
        return Ok(Value::list((*of).clone(), all));
    }
    Ok(Value::tuple(all))
}

fn range(args: &Args<'_>) -> Result<Value> {
    let numbers: Vec<Number> =
        (0..args.values.len()).map(|n| args.number(n)).collect::<Result<_>>()?;
    let one = |down: bool| Number::from(if down { -1i64 } else { 1 });
    let (start, end, step) = match *numbers {
        [end] => (Number::ZERO, end, one(end.is_negative())),
        [start, end] => (start, end, one(end < start)),
        [start, end, step] => (start, end, step),
        _ => return Err("must have one, two, or three arguments".into()),
    };
    if step.is_zero() {
        return Err(CallError::argument(2, "step must not be zero"));
    }
    let down = step.is_negative();
    if down && end > start {
        return Err(CallError::argument(1, "end must be less than start when step is negative"));
    }
    if !down && end < start {
        return Err(CallError::argument(1, "end must be greater than start when step is positive"));
    }
    let (mut all, mut number) = (Vec::new(), start);
    while if down { number > end } else { number < end } {
        if all.len() >= MAX_RANGE {
            return Err(format!("more than {MAX_RANGE} values were generated; either decrease the difference between start and end or use a smaller step").into());
        }
        all.push(Value::Number(number));
        number = number.add(step).ok_or(crate::number::RANGE)?;
    }
    Ok(Value::list(Type::Number, all))
}

/// Combines sets, one after another, once they have one type.
fn sets(args: &Args<'_>, combine: fn(&mut Vec<Value>, &[Value])) -> Result<Value> {
    let types: Vec<Type> = args
        .values
        .iter()
        .filter(|v| !v.sequence().is_some_and(|items| items.is_empty()))
        .filter_map(|v| v.ty().element().cloned())
        .collect();
    let of = match types.is_empty() {
        true => Type::Dynamic,
        false => unify(&types, true).ok_or("given sets must all have compatible element types")?,
    };
    let mut result: Option<Vec<Value>> = None;
    for n in 0..args.values.len() {
        let items: Vec<Value> =
            args.items(n)?.iter().map(|v| convert(v, &of)).collect::<Result<_, _>>()?;
        if items.len() > MAX_ELEMENTS {
            return Err("the set has too many elements".into());
        }
        match &mut result {
            None => result = Some(items),
            Some(have) => combine(have, &items),
        }
    }
    Ok(Value::set(of, result.unwrap_or_default()))
}

fn product(args: &Args<'_>) -> Result<Value> {
    if args.values.len() < 2 {
        return Err("at least two arguments are required".into());
    }
    let mut columns = Vec::new();
    let mut ordered = true;
    for (n, value) in args.values.iter().enumerate() {
        let items = value
            .sequence()
            .ok_or_else(|| CallError::argument(n, "a set or a list is required"))?;
        let of = match value.ty() {
            Type::Tuple(types) if types.is_empty() => Type::Dynamic,
            Type::Tuple(types) => unify(&types, true)
                .ok_or_else(|| CallError::argument(n, "all elements must be of the same type"))?,
            ty => ty.element().cloned().unwrap_or(Type::Dynamic),
        };
        ordered &= !matches!(value, Value::Set(..));
        let items: Vec<Value> = items.iter().map(|v| convert(v, &of)).collect::<Result<_, _>>()?;
        columns.push((of, items));
    }
    let total = columns.iter().try_fold(1usize, |n, (_, items)| n.checked_mul(items.len()));
    if total.is_none_or(|n| n > MAX_ELEMENTS) {
        return Err("the product has too many elements".into());
    }
    let mut rows: Vec<Vec<Value>> = vec![Vec::new()];
    for (_, items) in &columns {
        rows = rows
            .iter()
            .flat_map(|row| items.iter().map(|v| row.iter().cloned().chain([v.clone()]).collect()))
            .collect();
    }
    let of = Type::Tuple(columns.into_iter().map(|(of, _)| of).collect());
    let rows = rows.into_iter().map(Value::tuple).collect();
    Ok(if ordered { Value::list(of, rows) } else { Value::set(of, rows) })
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;

    #[test]
    fn lists_are_cut_joined_and_searched() {
        check("chunklist([1, 2, 3], 2)", "[[1,2],[3]]");
        check("concat([1], [\"a\"])", "[1,\"a\"]");
        check("flatten([[1, [2]], 3])", "[1,2,3]");
        check("distinct([\"a\", \"b\", \"a\"])", r#"["a","b"]"#);
        check("element([1, 2, 3], 4)", "2");
        check("slice([1, 2, 3], 1, 3)", "[2,3]");
        check("range(3)", "[0,1,2]");
        check("range(1, 10, 4)", "[1,5,9]");
        check("reverselist([1, 2])", "[2,1]");
        check("contains([\"a\"], \"a\")", "true");
        check("indexof([\"a\", \"b\"], \"b\")", "1");
        check("compact([\"\", \"a\"])", r#"["a"]"#);
        check("coalesce(null, \"a\")", r#""a""#);
        check("coalescelist([], [1])", "[1]");
        check("length([1, 2])", "2");
    }

    #[test]
    fn maps_are_merged_and_looked_into() {
        check("merge({a = 1, b = 2}, {b = 3})", r#"{"a":1,"b":3}"#);
        check("keys({b = 1, a = 2})", r#"["a","b"]"#);
        check("values({b = 1, a = 2})", "[2,1]");
        check("lookup({a = 1}, \"b\", 5)", "5");
        check("zipmap([\"a\"], [1])", r#"{"a":1}"#);
    }

    #[test]
    fn sets_have_each_element_once() {
        check("setunion([\"b\", \"a\"], [\"a\"])", r#"["a","b"]"#);
        check("setintersection([\"b\", \"a\"], [\"a\"])", r#"["a"]"#);
        check("setsubtract([\"b\", \"a\"], [\"a\"])", r#"["b"]"#);
        check("setsymmetricdifference([1, 2], [2, 3])", "[1,3]");
        check("setproduct([\"a\", \"b\"], [1])", r#"[["a",1],["b",1]]"#);
    }

    #[test]
    fn what_would_have_too_many_elements_is_refused() {
        check(
            "setproduct(range(1000), range(1000))",
            "error Error in function call; Call to function \"setproduct\" failed: the product has too many elements.",
        );
    }
}
