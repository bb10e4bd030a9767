//! What values can become: conversions between types, and the type that several can become.
//!
//! A conversion is safe if it is known to succeed by the types alone; others are tried where a
//! value has to be of a type.

use std::collections::BTreeMap;

use crate::{
    number::Number,
    value::{Field, Type, Value},
};

/// Whether a value of type `from` may become one of type `to`.
pub(crate) fn convertible(from: &Type, to: &Type, is_unsafe: bool) -> bool {
    use Type::{Bool, Dynamic, List, Map, Number, Object, Set, String, Tuple};
    let each = |from: &Type, to: &Type| from == to || convertible(from, to, is_unsafe);
    match (from, to) {
        (_, Dynamic) => true,
        (Dynamic, _) => is_unsafe,
        (Number | Bool, String) => true,
        (String, Number | Bool) => is_unsafe,
        (a, b) if a.is_primitive() && b.is_primitive() => a == b,
        (Object(from), Object(to)) => to.iter().all(|(name, field)| match from.get(name) {
            Some(have) => each(&have.ty, &field.ty),
            None => field.optional,
        }),
        (Tuple(from), Tuple(to)) => {
            from.len() == to.len() && from.iter().zip(to.iter()).all(|(a, b)| each(a, b))
        }
        (List(from) | Set(from), List(to)) | (Set(from), Set(to)) | (Map(from), Map(to)) => {
            each(from, to)
        }
        (List(from), Set(to)) => is_unsafe && each(from, to),
        (Tuple(from), List(to) | Set(to)) => {
            from.is_empty()
                || common(to, from.iter(), is_unsafe)
                    .is_some_and(|to| from.iter().all(|f| each(f, &to)))
        }
        (Object(from), Map(to)) => {
            let types = || from.values().map(|f| &f.ty);
            from.is_empty()
                || common(to, types(), is_unsafe).is_some_and(|to| types().all(|f| each(f, &to)))
        }
        (Map(from), Object(to)) => {
            is_unsafe && to.values().all(|f| f.optional || each(from, &f.ty))
        }
        _ => false,
    }
}

/// The type of the elements of a collection: as given, or what they have in common.
fn common<'t>(
    wanted: &Type,
    types: impl Iterator<Item = &'t Type>,
    is_unsafe: bool,
) -> Option<Type> {
    if *wanted != Type::Dynamic {
        return Some(wanted.clone());
    }
    let types: Vec<Type> = types.cloned().collect();
    match unify(&types, is_unsafe)? {
        Type::Dynamic if types.iter().any(|t| *t != Type::Dynamic) => None,
        found => Some(found),
    }
}

/// `to` without marks of optional attributes, as the type of a value.
fn settled(to: &Type) -> Type {
    match to {
        Type::List(of) => Type::list(settled(of)),
        Type::Set(of) => Type::set(settled(of)),
        Type::Map(of) => Type::map(settled(of)),
        Type::Tuple(of) => Type::Tuple(of.iter().map(settled).collect()),
        Type::Object(fields) => {
            Type::object(fields.iter().map(|(name, f)| (name.clone(), settled(&f.ty))))
        }
        other => other.clone(),
    }
}

/// `value` as a value of type `to`; the error says what is required.
pub(crate) fn convert(value: &Value, to: &Type) -> Result<Value, String> {
    if let Some(done) = collection_of(value, to) {
        return Ok(done);
    }
    let from = value.ty();
    if from == *to || *to == Type::Dynamic {
        return Ok(value.clone());
    }
    if !convertible(&from, to, true) {
        return Err(mismatch(&from, to));
    }
    apply(value, to)
}

/// A tuple or object as a list or map, if all elements have a simple type that needs no conversion:
/// most values of definitions are texts, lists of texts, and maps of texts.
fn collection_of(value: &Value, to: &Type) -> Option<Value> {
    let is_of = |v: &Value, of: &Type| match v {
        Value::Bool(_) => *of == Type::Bool,
        Value::Number(_) => *of == Type::Number,
        Value::String(_) => *of == Type::String,
        _ => false,
    };
    match (value, to) {
        (Value::Tuple(items), Type::List(of)) if of.is_primitive() => {
            items.iter().all(|v| is_of(v, of)).then(|| Value::List(of.clone(), items.clone()))
        }
        (Value::Object(fields), Type::Map(of)) if of.is_primitive() => {
            fields.values().all(|v| is_of(v, of)).then(|| Value::Map(of.clone(), fields.clone()))
        }
        _ => None,
    }
}

fn apply(value: &Value, to: &Type) -> Result<Value, String> {
    let each = |v: &Value, to: &Type| convert(v, to);
    match (value, to) {
        (_, Type::Dynamic) => Ok(value.clone()),
        (Value::Null(_), _) => Ok(Value::Null(settled(to))),
        (Value::Number(n), Type::String) => Ok(Value::string(n.to_string())),
        (Value::Bool(b), Type::String) => Ok(Value::string(if *b { "true" } else { "false" })),
        (Value::String(text), Type::Number) => {
            Number::parse(text).map(Value::Number).ok_or_else(|| "a number is required".into())
        }
        (Value::String(text), Type::Bool) => match &**text {
            "true" | "1" => Ok(Value::Bool(true)),
            "false" | "0" => Ok(Value::Bool(false)),
            other => Err(match other.to_lowercase().as_str() {
                lower @ ("true" | "false") => {
                    format!("a bool is required; to convert from string, use lowercase \"{lower}\"")
                }
                _ => "a bool is required".into(),
            }),
        },
        (Value::List(..) | Value::Set(..) | Value::Tuple(_), Type::List(of) | Type::Set(of)) => {
            let items = value.sequence().map(|i| i.as_slice()).unwrap_or_default();
            let of = match value.ty().element() {
                Some(have) if **of == Type::Dynamic => have.clone(),
                Some(_) => (**of).clone(),
                None => {
                    let types: Vec<Type> = items.iter().map(Value::ty).collect();
                    common(of, types.iter(), true).unwrap_or_else(|| (**of).clone())
                }
            };
            let mut elements = items.iter().map(|v| each(v, &of)).collect::<Result<Vec<_>, _>>()?;
            let of = one_type(&mut elements, settled(&of))?;
            Ok(match to {
                Type::List(_) => Value::list(of, elements),
                _ => Value::set(of, elements),
            })
        }
        (Value::Map(..) | Value::Object(_), Type::Map(of)) => {
            let Some(fields) = value.mapping() else { return Err(mismatch(&value.ty(), to)) };
            let of = match value {
                Value::Map(have, _) if **of == Type::Dynamic => (**have).clone(),
                Value::Map(..) => (**of).clone(),
                _ => {
                    let types: Vec<Type> = fields.values().map(Value::ty).collect();
                    common(of, types.iter(), true).unwrap_or_else(|| (**of).clone())
                }
            };
            let names: Vec<String> = fields.keys().cloned().collect();
            let mut elements =
                fields.values().map(|v| each(v, &of)).collect::<Result<Vec<_>, _>>()?;
            let of = one_type(&mut elements, settled(&of))?;
            Ok(Value::map(of, names.into_iter().zip(elements).collect()))
        }
        (Value::Tuple(items), Type::Tuple(types)) => {
            let elements = items.iter().zip(types.iter()).map(|(v, t)| each(v, t));
            Ok(Value::tuple(elements.collect::<Result<_, _>>()?))
        }
        (Value::Map(..) | Value::Object(_), Type::Object(wanted)) => {
            let Some(fields) = value.mapping() else { return Err(mismatch(&value.ty(), to)) };
            let mut elements = BTreeMap::new();
            for (name, field) in wanted.iter() {
                let element = match fields.get(name) {
                    Some(v) => each(v, &field.ty)?,
                    None if field.optional => Value::Null(settled(&field.ty)),
                    None => {
                        return Err(format!("map has no element for required attribute {name:?}"));
                    }
                };
                elements.insert(name.clone(), element);
            }
            Ok(Value::object(elements))
        }
        _ => Err(mismatch(&value.ty(), to)),
    }
}

/// Makes `elements` of a collection of `of` the same type, where that leaves it open.
fn one_type(elements: &mut [Value], of: Type) -> Result<Type, String> {
    if !of.has_dynamic() || elements.is_empty() {
        return Ok(of);
    }
    let types: Vec<Type> = elements.iter().map(Value::ty).collect();
    let found = unify(&types, true).ok_or("cannot find a common base type for all elements")?;
    for element in elements {
        *element = convert(element, &found)?;
    }
    Ok(found)
}

/// The type that values of all `types` can become.
pub(crate) fn unify(types: &[Type], is_unsafe: bool) -> Option<Type> {
    let first = types.first()?;
    if types.iter().all(|t| t == first) {
        return Some(first.clone());
    }
    let count = |matches: fn(&Type) -> bool| types.iter().filter(|t| matches(t)).count();
    let dynamic = count(|t| *t == Type::Dynamic);
    let maps = count(|t| matches!(t, Type::Map(_)));
    let lists = count(|t| matches!(t, Type::List(_)));
    let sets = count(|t| matches!(t, Type::Set(_)));
    let objects = count(|t| matches!(t, Type::Object(_)));
    let tuples = count(|t| matches!(t, Type::Tuple(_)));
    let all = types.len();
    let same_kind =
        [maps, lists, sets, objects, tuples].iter().any(|n| *n > 0 && n + dynamic == all);
    if same_kind && dynamic > 0 {
        return Some(Type::Dynamic);
    }
    let of_elements = |make: fn(Type) -> Type| {
        let elements: Vec<Type> = types.iter().filter_map(|t| t.element().cloned()).collect();
        unify(&elements, is_unsafe).map(make)
    };
    if maps == all {
        return of_elements(Type::map);
    }
    if lists == all {
        return of_elements(Type::list);
    }
    if sets == all {
        return of_elements(Type::set);
    }
    if objects == all {
        return unify_objects(types, is_unsafe);
    }
    if tuples == all {
        return unify_tuples(types, is_unsafe);
    }
    if maps > 0 && maps + objects + dynamic == all {
        let objects: Vec<Type> =
            types.iter().filter(|t| matches!(t, Type::Object(_))).cloned().collect();
        if let Some(found @ Type::Map(_)) = objects_as_map(&objects, is_unsafe)
            && let Some(found @ Type::Map(_)) =
                replaced(types, &found, |t| matches!(t, Type::Object(_)), is_unsafe)
        {
            return Some(found);
        }
    } else if lists > 0 && lists + tuples + dynamic == all {
        let tuples: Vec<Type> =
            types.iter().filter(|t| matches!(t, Type::Tuple(_))).cloned().collect();
        if let Some(found @ Type::List(_)) = tuples_as_list(&tuples, is_unsafe)
            && let Some(found @ Type::List(_)) =
                replaced(types, &found, |t| matches!(t, Type::Tuple(_)), is_unsafe)
        {
            return Some(found);
        }
    } else if objects > 0 && tuples > 0 {
        return None;
    }
    // The most general of them, if all others can become that.
    let general = |wanted: &&Type| {
        types.iter().all(|t| t == *wanted || convertible(t, wanted, false))
            || (is_unsafe && types.iter().all(|t| t == *wanted || convertible(t, wanted, true)))
    };
    types
        .iter()
        .find(|t| types.iter().all(|o| o == *t || convertible(o, t, false)))
        .or_else(|| types.iter().find(general))
        .cloned()
}

/// The type in common, with `found` in place of those that `which` names.
fn replaced(
    types: &[Type],
    found: &Type,
    which: fn(&Type) -> bool,
    is_unsafe: bool,
) -> Option<Type> {
    let types: Vec<Type> =
        types.iter().map(|t| if which(t) { found.clone() } else { t.clone() }).collect();
    unify(&types, is_unsafe)
}

fn object_fields(ty: &Type) -> Option<&BTreeMap<String, Field>> {
    match ty {
        Type::Object(fields) => Some(fields),
        _ => None,
    }
}

fn unify_objects(types: &[Type], is_unsafe: bool) -> Option<Type> {
    let all: Vec<&BTreeMap<String, Field>> = types.iter().filter_map(object_fields).collect();
    let first = all.first()?;
    if !all.iter().all(|fields| fields.keys().eq(first.keys())) {
        return objects_as_map(types, is_unsafe);
    }
    let mut unified = BTreeMap::new();
    for name in first.keys() {
        let across: Vec<Type> = all.iter().map(|fields| fields[name].ty.clone()).collect();
        unified.insert(name.clone(), unify(&across, is_unsafe)?);
    }
    let unified = Type::object(unified);
    match types.iter().all(|t| *t == unified || convertible(t, &unified, is_unsafe)) {
        true => Some(unified),
        false => objects_as_map(types, is_unsafe),
    }
}

fn objects_as_map(types: &[Type], is_unsafe: bool) -> Option<Type> {
    let elements: Vec<Type> = types
        .iter()
        .filter_map(object_fields)
        .flat_map(|fields| fields.values().map(|f| f.ty.clone()))
        .collect();
    let unified = Type::map(unify(&elements, is_unsafe)?);
    types.iter().all(|t| convertible(t, &unified, is_unsafe)).then_some(unified)
}

fn unify_tuples(types: &[Type], is_unsafe: bool) -> Option<Type> {
    let all: Vec<&[Type]> = types
        .iter()
        .filter_map(|t| match t {
            Type::Tuple(elements) => Some(&**elements),
            _ => None,
        })
        .collect();
    let first = all.first()?;
    if !all.iter().all(|elements| elements.len() == first.len()) {
        return tuples_as_list(types, is_unsafe);
    }
    let mut unified = Vec::new();
    for index in 0..first.len() {
        let across: Vec<Type> = all.iter().map(|elements| elements[index].clone()).collect();
        unified.push(unify(&across, is_unsafe)?);
    }
    let unified = Type::Tuple(unified.into());
    match types.iter().all(|t| *t == unified || convertible(t, &unified, is_unsafe)) {
        true => Some(unified),
        false => tuples_as_list(types, is_unsafe),
    }
}

fn tuples_as_list(types: &[Type], is_unsafe: bool) -> Option<Type> {
    let elements: Vec<Type> = types
        .iter()
        .filter_map(|t| match t {
            Type::Tuple(elements) => Some(elements.iter().cloned()),
            _ => None,
        })
        .flatten()
        .collect();
    let unified = Type::list(unify(&elements, is_unsafe)?);
    types.iter().all(|t| convertible(t, &unified, is_unsafe)).then_some(unified)
}

/// What keeps a value of type `got` from becoming one of type `want`.
pub(crate) fn mismatch(got: &Type, want: &Type) -> String {
    let element = |index: String, got: &Type, want: &Type| {
        (got != want && !convertible(got, want, true))
            .then(|| format!("element {index}: {}", mismatch(got, want)))
    };
    match (got, want) {
        (Type::Object(got), Type::Object(want)) => mismatched_objects(got, want),
        (Type::Tuple(_), Type::List(of)) if **of == Type::Dynamic => {
            "all list elements must have the same type".into()
        }
        (Type::Tuple(_), Type::Set(of)) if **of == Type::Dynamic => {
            "all set elements must have the same type".into()
        }
        (Type::Object(_), Type::Map(of)) if **of == Type::Dynamic => {
            "all map elements must have the same type".into()
        }
        (Type::Tuple(got), Type::List(of) | Type::Set(of)) => got
            .iter()
            .enumerate()
            .find_map(|(i, got)| element(i.to_string(), got, of))
            .unwrap_or_else(|| format!("all elements must be {}", of.constraint())),
        (Type::Object(got), Type::Map(of)) => got
            .iter()
            .find_map(|(name, got)| element(format!("{name:?}"), &got.ty, of))
            .unwrap_or_else(|| format!("all elements must be {}", of.constraint())),
        (Type::List(got) | Type::Set(got), Type::List(want)) => {
            format!("incorrect list element type: {}", mismatch(got, want))
        }
        (Type::List(got) | Type::Set(got), Type::Set(want)) => {
            format!("incorrect set element type: {}", mismatch(got, want))
        }
        (Type::Map(got), Type::Map(want)) => {
            format!("incorrect map element type: {}", mismatch(got, want))
        }
        (got, want)
            if (got.is_primitive() != want.is_primitive()
                && !want.is_collection()
                && !got.is_collection()
                || *want == Type::String && !got.is_collection())
                && *got != Type::Dynamic =>
        {
            format!("{want} required, but have {got}")
        }
        _ => format!("{} required", want.constraint()),
    }
}

fn mismatched_objects(got: &BTreeMap<String, Field>, want: &BTreeMap<String, Field>) -> String {
    let missing: Vec<String> = want
        .iter()
        .filter(|(name, field)| !field.optional && !got.contains_key(*name))
        .map(|(name, _)| format!("{name:?}"))
        .collect();
    match missing.as_slice() {
        [] => {}
        [one] => return format!("attribute {one} is required"),
        [one, two] => return format!("attributes {one} and {two} are required"),
        [most @ .., last] => {
            return format!("attributes {}, and {last} are required", most.join(", "));
        }
    }
    want.iter()
        .filter_map(|(name, want)| Some((name, &got.get(name)?.ty, &want.ty)))
        .find(|(_, got, want)| got != want && !convertible(got, want, true))
        .map_or_else(
            || "incorrect object attributes".into(),
            |(name, got, want)| format!("attribute {name:?}: {}", mismatch(got, want)),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(s: &str) -> Value {
        Value::string(s)
    }

    #[test]
    fn primitives_become_what_they_look_like() {
        assert_eq!(convert(&text("1.50"), &Type::Number).unwrap().ty(), Type::Number);
        assert_eq!(convert(&text("1"), &Type::Bool), Ok(Value::Bool(true)));
        assert_eq!(
            convert(&text("True"), &Type::Bool).unwrap_err(),
            "a bool is required; to convert from string, use lowercase \"true\""
        );
        assert_eq!(convert(&text("x"), &Type::Number).unwrap_err(), "a number is required");
        assert_eq!(
            convert(&Value::tuple(vec![text("x")]), &Type::map(Type::String)).unwrap_err(),
            "map of string required"
        );
        assert_eq!(convert(&Value::NULL, &Type::String), Ok(Value::Null(Type::String)));
    }

    #[test]
    fn tuples_and_objects_become_collections_of_what_they_have_in_common() {
        let mixed = Value::tuple(vec![text("a"), Value::Bool(true), Value::NULL]);
        let list = convert(&mixed, &Type::list(Type::String)).unwrap();
        assert_eq!(list.sequence().unwrap()[1], text("true"));
        let any = convert(
            &Value::tuple(vec![text("a"), Value::Number(Number::from(1i64))]),
            &Type::list(Type::Dynamic),
        );
        assert_eq!(any.unwrap().ty(), Type::list(Type::String));
        let unlike = Value::tuple(vec![text("a"), Value::tuple(vec![])]);
        assert_eq!(
            convert(&unlike, &Type::list(Type::String)).unwrap_err(),
            "element 1: string required, but have tuple"
        );
    }

    #[test]
    fn types_meet_where_all_can_go() {
        use Type::{Bool, Number as N, String as S};
        assert_eq!(unify(&[N, S], true), Some(S));
        assert_eq!(unify(&[Bool, S, N], true), Some(S));
        assert_eq!(unify(&[Bool, N], true), None);
        assert_eq!(unify(&[S, Type::Dynamic], true), Some(Type::Dynamic));
        let tuple = |of: &[Type]| Type::Tuple(of.to_vec().into());
        assert_eq!(unify(&[tuple(&[S]), tuple(&[N])], true), Some(tuple(&[S])));
        assert_eq!(unify(&[tuple(&[S]), tuple(&[])], true), Some(Type::list(S)));
        assert_eq!(unify(&[Type::list(S), tuple(&[N, S])], true), Some(Type::list(S)));
        let object = |name: &str| Type::object([(name.to_owned(), S)]);
        assert_eq!(unify(&[object("a"), object("b")], true), Some(Type::map(S)));
        assert_eq!(unify(&[object("a"), tuple(&[])], true), None);
    }
}
