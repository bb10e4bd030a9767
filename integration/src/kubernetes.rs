//! Manifests of Kubernetes: reading their YAML, and comparing them with the types of its API.
//!
//! `saphyr-parser` reads YAML's events.

use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Value, json};
use std::{fs, path::Path};

/// The documents of a text, as JSON. Anchors and aliases are not for manifests.
#[track_caller]
pub fn documents(text: &str) -> Vec<Value> {
    let (mut all, mut open) = (Vec::new(), Vec::<(Value, Option<String>)>::new());
    let mut root = None;
    for event in &mut Parser::new_from_str(text) {
        let (event, span) = event.unwrap_or_else(|e| panic!("{e}\n{text}"));
        let done = match event {
            Event::MappingStart(..) => {
                open.push((json!({}), None));
                continue;
            }
            Event::SequenceStart(..) => {
                open.push((json!([]), None));
                continue;
            }
            Event::MappingEnd | Event::SequenceEnd => open.pop().unwrap().0,
            Event::Scalar(text, style, ..) => match style {
                ScalarStyle::Plain => plain(&text),
                _ => Value::String(text.into_owned()),
            },
            Event::DocumentEnd => {
                all.push(root.take().unwrap_or(Value::Null));
                continue;
            }
            Event::Alias(_) => panic!("line {}: an alias", span.start.line()),
            _ => continue,
        };
        match open.last_mut() {
            None => root = Some(done),
            Some((Value::Array(list), _)) => list.push(done),
            Some((Value::Object(map), key)) => match key.take() {
                None => *key = Some(done.as_str().expect("keys are strings").to_owned()),
                Some(key) => {
                    let twice = map.insert(key.clone(), done).is_some();
                    assert!(!twice, "line {}: {key} is there twice", span.start.line());
                }
            },
            Some(_) => unreachable!("only collections are open"),
        }
    }
    all
}

fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" => Value::Null,
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        _ => text.parse::<i64>().map_or_else(|_| Value::String(text.to_owned()), Value::from),
    }
}

/// What types of Kubernetes' API have: fields with their types, and which of them must be there.
/// Taken from the OpenAPI description of version 1.37, for the kinds that we use.
pub struct Types(Map<String, Value>);

impl Types {
    /// Reads the table.
    #[track_caller]
    pub fn read(file: &Path) -> Self {
        let text = fs::read_to_string(file).unwrap();
        Self(serde_json::from_str(&text).unwrap())
    }

    /// What is wrong with an object of Kubernetes: unknown fields, missing ones, and values of
    /// another type.
    pub fn problems(&self, object: &Value) -> Vec<String> {
        let version = object["apiVersion"].as_str().unwrap_or_default();
        let kind = object["kind"].as_str().unwrap_or_default();
        // Types have the group's first word, and "core" for the group without a name.
        let (group, version) = version.rsplit_once('/').unwrap_or(("core", version));
        let group = group.split('.').next().unwrap_or_default();
        let name = format!("{group}.{version}.{kind}");
        let mut problems = Vec::new();
        if !self.0.contains_key(&name) {
            return vec![format!("{name} is not a type")];
        }
        self.check(&json!(name), object, kind, &mut problems);
        problems
    }

    fn check(&self, kind: &Value, value: &Value, at: &str, problems: &mut Vec<String>) {
        let mut wrong = |what: &str| problems.push(format!("{at}: {value} is not {what}"));
        match kind {
            Value::Array(item) => match value.as_array() {
                None => wrong("a list"),
                Some(list) => list.iter().enumerate().for_each(|(index, one)| {
                    self.check(&item[0], one, &format!("{at}[{index}]"), problems);
                }),
            },
            Value::Object(map) => match value.as_object() {
                None => wrong("a map"),
                Some(all) => all.iter().for_each(|(key, one)| {
                    self.check(&map["*"], one, &format!("{at}.{key}"), problems);
                }),
            },
            Value::String(name) => match name.as_str() {
                "any" => {}
                "string" if !value.is_string() => wrong("a string"),
                "boolean" if !value.is_boolean() => wrong("a boolean"),
                "integer" if !value.is_i64() => wrong("an integer"),
                "number" if !value.is_number() => wrong("a number"),
                "int-or-string" if !(value.is_i64() || value.is_string()) => {
                    wrong("an integer or a string");
                }
                "string" | "boolean" | "integer" | "number" | "int-or-string" => {}
                name => self.check_type(name, value, at, problems),
            },
            other => panic!("the table of types has {other}"),
        }
    }

    fn check_type(&self, name: &str, value: &Value, at: &str, problems: &mut Vec<String>) {
        let of = self.0.get(name).unwrap_or_else(|| panic!("the table of types has no {name}"));
        let Some(fields) = of["fields"].as_object() else {
            return self.check(of, value, at, problems);
        };
        let Some(object) = value.as_object() else {
            problems.push(format!("{at}: {value} is not an object"));
            return;
        };
        for required in of["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !object.contains_key(required) {
                problems.push(format!("{at} has no {required}"));
            }
        }
        for (key, one) in object {
            let path = format!("{at}.{key}");
            match fields.get(key) {
                Some(kind) => self.check(kind, one, &path, problems),
                None => problems.push(format!("{path} is not a field")),
            }
        }
    }
}
