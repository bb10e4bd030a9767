//! Types as definitions write them: `string`, `list(number)`, `object({…})`.

use std::collections::BTreeMap;

use hcl_edit::expr::{Expression, ObjectKey};

use crate::{
    json::Json,
    problem::{Outcome, Problem},
    source::{Expr, place},
    value::Type,
};

const HEADING: &str = "Invalid type specification";

/// The type that `expr` writes.
pub(crate) fn constraint(expr: Expr<'_>) -> Outcome<Type> {
    match expr {
        Expr::Hcl(expression, source) => {
            parse(expression).map_err(|p| p.at(place(expression, source)))
        }
        Expr::Json(Json::Text(text), _) => match text.raw.parse::<Expression>() {
            Ok(expression) if crate::nesting::check(&text.raw).is_ok() => parse(&expression),
            _ => Err(Problem::new(HEADING, format!("{:?} is not a type.", text.raw))),
        },
        Expr::Json(..) => Err(Problem::new(HEADING, "A type is written as a text.")),
    }
}

fn parse(expression: &Expression) -> Outcome<Type> {
    match expression {
        Expression::Variable(name) => match name.as_str() {
            "bool" => Ok(Type::Bool),
            "string" => Ok(Type::String),
            "number" => Ok(Type::Number),
            "any" => Ok(Type::Dynamic),
            kind @ ("list" | "set" | "map") => Err(Problem::new(
                HEADING,
                format!(
                    "The {kind} type constructor requires one argument specifying the element type."
                ),
            )),
            "object" => Err(Problem::new(
                HEADING,
                "The object type constructor requires one argument specifying the attribute types and values as a map.",
            )),
            "tuple" => Err(Problem::new(
                HEADING,
                "The tuple type constructor requires one argument specifying the element types as a list.",
            )),
            other => Err(Problem::new(
                HEADING,
                format!("The keyword {other:?} is not a valid type specification."),
            )),
        },
        Expression::FuncCall(call) => {
            let name = call.name.name.as_str();
            let args: Vec<&Expression> = call.args.iter().collect();
            match (name, args.as_slice()) {
                ("list", [of]) => Ok(Type::list(parse(of)?)),
                ("set", [of]) => Ok(Type::set(parse(of)?)),
                ("map", [of]) => Ok(Type::map(parse(of)?)),
                ("tuple", [Expression::Array(of)]) => {
                    Ok(Type::Tuple(of.iter().map(parse).collect::<Outcome<_>>()?))
                }
                ("object", [Expression::Object(of)]) => {
                    let mut fields = BTreeMap::new();
                    for (key, value) in of.iter() {
                        let name = match key {
                            ObjectKey::Ident(name) => name.as_str(),
                            ObjectKey::Expression(Expression::String(name)) => name.as_str(),
                            ObjectKey::Expression(_) => {
                                return Err(Problem::new(
                                    HEADING,
                                    "Object constructor map keys must be attribute names.",
                                ));
                            }
                        };
                        fields.insert(name.to_owned(), parse(value.expr())?);
                    }
                    Ok(Type::object(fields))
                }
                ("list" | "set" | "map" | "tuple" | "object", _) => Err(Problem::new(
                    HEADING,
                    format!("The {name} type constructor requires one argument of its own form."),
                )),
                ("bool" | "string" | "number" | "any", _) => Err(Problem::new(
                    HEADING,
                    format!("Primitive type keyword {name:?} does not expect arguments."),
                )),
                ("optional", _) => Err(Problem::new(
                    HEADING,
                    "Optional attribute modifier is only for attributes of an object type constraint with defaults.",
                )),
                _ => Err(Problem::new(
                    HEADING,
                    format!("Keyword {name:?} is not a valid type constructor."),
                )),
            }
        }
        _ => Err(Problem::new(
            HEADING,
            "A type specification is either a primitive type keyword (bool, number, string) or a complex type constructor call, like list(string).",
        )),
    }
}
