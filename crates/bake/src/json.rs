//! The JSON form of definitions: members in their order, also those that are there twice, and texts
//! as templates.

use std::fmt;

use hcl_edit::template::{Element, Template};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::{nesting, number::Number};

/// A text, which is a template where it is evaluated.
#[derive(Debug)]
pub(crate) struct Text {
    pub(crate) raw: String,
    /// What is wrong with it as a template, if something is.
    pub(crate) template: Result<Template, String>,
}

impl Text {
    fn new(raw: String) -> Self {
        let template = match nesting::check(&raw) {
            // Most texts are nothing but text.
            Ok(()) if !raw.contains("${") && !raw.contains("%{") => {
                Ok(Template::from(vec![Element::from(raw.clone())]))
            }
            Ok(()) => raw.parse().map_err(|e: hcl_edit::parser::Error| e.message().to_owned()),
            Err(why) => Err(why),
        };
        Self { raw, template }
    }
}

/// A value of the document.
#[derive(Debug)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    /// `None` if it has too many digits.
    Number(Option<Number>),
    Text(Text),
    Array(Vec<Json>),
    Object(Vec<(Text, Json)>),
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Number(Some(value.into())))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(Some(Number::whole(value.into()))))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Number(Number::from_f64(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::Text(Text::new(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Json, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element()? {
            values.push(value);
        }
        Ok(Json::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut members = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            members.push((Text::new(name), map.next_value()?));
        }
        Ok(Json::Object(members))
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader)
    }
}
