//! The part of Go's templates that scripts use with `--format`: fields, `range`, `if`, `index`,
//! `len`, `json`, `join`, pipes.
//!
//! Values are the JSON of what is printed; a field is found by its Go name (`.ID`) or its JSON
//! name.

use serde_json::Value;
use shipway_fault::{Fault, Result};
use shipway_oci::gojson;

/// What differs between the programs whose templates these are.
#[derive(Clone, Copy)]
struct Style {
    /// Whether `json` prints over several lines.
    indented: bool,
    /// Whether a field that is not there is nothing, as in Go's maps, instead of an error.
    lenient: bool,
}

/// Formats `value` with `template`; `json` alone means the whole value.
pub(crate) fn render(template: &str, value: &Value) -> Result<String> {
    let template = if template == "json" { "{{json .}}" } else { template };
    formatted(template, value, Style { indented: false, lenient: false })
}

/// The same where `json` prints over several lines, and values leave out fields that are empty.
pub(crate) fn render_indented(template: &str, value: &Value) -> Result<String> {
    formatted(template, value, Style { indented: true, lenient: true })
}

fn formatted(template: &str, value: &Value, style: Style) -> Result<String> {
    let failed = |fault: Fault| fault.context(format!("format the output with {template:?}"));
    let nodes = parse(template).map_err(failed)?;
    let mut out = String::new();
    run(&nodes, value, style, &mut out).map_err(failed)?;
    Ok(out)
}

enum Node {
    Text(String),
    Print(Vec<Vec<Word>>),
    Range(Vec<Vec<Word>>, Vec<Node>),
    If(Vec<Vec<Word>>, Vec<Node>, Vec<Node>),
}

#[derive(Debug)]
enum Word {
    Path(Vec<String>),
    Call(String),
    Text(String),
    Number(i64),
    Group(Vec<Vec<Word>>, Vec<String>),
}

/// Deepest nesting of blocks and parentheses.
const DEPTH: usize = 32;

fn parse(template: &str) -> Result<Vec<Node>> {
    let mut rest = template;
    let (nodes, end) = parse_block(&mut rest, 0)?;
    if end != Stop::Text {
        return Err(Fault::invalid("an end or else without its beginning"));
    }
    Ok(nodes)
}

/// What a block stopped at.
#[derive(PartialEq)]
enum Stop {
    Text,
    End,
    Else,
}

fn parse_block(rest: &mut &str, depth: usize) -> Result<(Vec<Node>, Stop)> {
    if depth > DEPTH {
        return Err(Fault::invalid("too many blocks inside each other"));
    }
    let mut nodes = Vec::new();
    loop {
        let Some((text, after)) = rest.split_once("{{") else {
            nodes.push(Node::Text((*rest).to_owned()));
            *rest = "";
            return Ok((nodes, Stop::Text));
        };
        let (action, after) =
            after.split_once("}}").ok_or_else(|| Fault::invalid("unclosed action"))?;
        let (trim_left, action) = action.strip_prefix("- ").map_or((false, action), |a| (true, a));
        let (trim_right, action) = action.strip_suffix(" -").map_or((false, action), |a| (true, a));
        nodes.push(Node::Text(if trim_left { text.trim_end() } else { text }.to_owned()));
        *rest = if trim_right { after.trim_start() } else { after };
        let action = action.trim();
        let inside = |rest: &mut &str| match parse_block(rest, depth + 1)? {
            (nodes, Stop::Text) => {
                Err(Fault::invalid(format!("{} blocks without end", nodes.len().min(1))))
            }
            done => Ok(done),
        };
        match action.split_once(char::is_whitespace).unwrap_or((action, "")) {
            ("end", "") => return Ok((nodes, Stop::End)),
            ("else", "") => return Ok((nodes, Stop::Else)),
            ("range", list) => match inside(rest)? {
                (body, Stop::End) => nodes.push(Node::Range(pipeline(list, depth)?, body)),
                _ => return Err(Fault::invalid("range with else is not supported")),
            },
            ("if", condition) => {
                let (then, end) = inside(rest)?;
                let otherwise = if end == Stop::Else { inside(rest)?.0 } else { Vec::new() };
                nodes.push(Node::If(pipeline(condition, depth)?, then, otherwise));
            }
            _ => nodes.push(Node::Print(pipeline(action, depth)?)),
        }
    }
}

fn pipeline(text: &str, depth: usize) -> Result<Vec<Vec<Word>>> {
    if depth > DEPTH {
        return Err(Fault::invalid("too many parentheses inside each other"));
    }
    let mut stages = vec![Vec::new()];
    let mut rest = text.trim();
    while let Some(first) = rest.chars().next() {
        let (word, after) = match first {
            '|' => {
                stages.push(Vec::new());
                rest = rest[1..].trim_start();
                continue;
            }
            '"' | '`' => {
                let end = rest[1..]
                    .find(first)
                    .ok_or_else(|| Fault::invalid("unterminated quoted string"))?;
                (
                    Word::Text(rest[1..=end].replace("\\n", "\n").replace("\\t", "\t")),
                    &rest[end + 2..],
                )
            }
            '(' => {
                let end = closing(rest)?;
                let after = &rest[end + 1..];
                let stop =
                    after.find(|c: char| c.is_whitespace() || c == '|').unwrap_or(after.len());
                (
                    Word::Group(pipeline(&rest[1..end], depth + 1)?, path(&after[..stop])),
                    &after[stop..],
                )
            }
            _ => {
                let stop = rest.find(|c: char| c.is_whitespace() || c == '|').unwrap_or(rest.len());
                let word = &rest[..stop];
                let parsed = match (word.strip_prefix('.'), word.parse()) {
                    (Some(_), _) => Word::Path(path(word)),
                    (_, Ok(number)) => Word::Number(number),
                    _ => Word::Call(word.to_owned()),
                };
                (parsed, &rest[stop..])
            }
        };
        if let Some(stage) = stages.last_mut() {
            stage.push(word);
        }
        rest = after.trim_start();
    }
    if stages.iter().any(Vec::is_empty) {
        return Err(Fault::invalid("missing value for command"));
    }
    Ok(stages)
}

fn closing(text: &str) -> Result<usize> {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' if depth == 1 => return Ok(at),
            ')' => depth -= 1,
            _ => {}
        }
    }
    Err(Fault::invalid("unclosed left paren"))
}

fn path(text: &str) -> Vec<String> {
    text.split('.').filter(|p| !p.is_empty()).map(str::to_owned).collect()
}

fn walk(value: &Value, path: &[String], style: Style) -> Result<Value> {
    let mut value = value.clone();
    for name in path {
        let Value::Object(fields) = &value else {
            if style.lenient && value.is_null() {
                return Ok(Value::Null);
            }
            return Err(Fault::invalid(format!(
                "can't evaluate field {name} in a value that has none"
            )));
        };
        let found = fields.get(name).or_else(|| {
            fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, v)| v)
        });
        value = match found {
            Some(found) => found.clone(),
            None if style.lenient => Value::Null,
            None => return Err(Fault::invalid(format!("can't evaluate field {name}"))),
        };
    }
    Ok(value)
}

fn show(value: &Value) -> String {
    match value {
        Value::Null => "<nil>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            format!("[{}]", items.iter().map(show).collect::<Vec<_>>().join(" "))
        }
        Value::Object(fields) => {
            format!(
                "map[{}]",
                fields
                    .iter()
                    .map(|(k, v)| format!("{k}:{}", show(v)))
                    .collect::<Vec<_>>()
                    .join(" ")
            )
        }
        other => other.to_string(),
    }
}

fn truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    }
}

fn evaluate(stages: &[Vec<Word>], dot: &Value, style: Style) -> Result<Value> {
    let mut piped: Option<Value> = None;
    for stage in stages {
        let (first, arguments) =
            stage.split_first().ok_or_else(|| Fault::invalid("missing value for command"))?;
        piped = Some(if let Word::Call(name) = first {
            let mut values =
                arguments.iter().map(|w| single(w, dot, style)).collect::<Result<Vec<_>>>()?;
            values.extend(piped.take());
            call(name, &values, style)?
        } else {
            single(first, dot, style)?
        });
    }
    piped.ok_or_else(|| Fault::invalid("missing value for command"))
}

fn single(word: &Word, dot: &Value, style: Style) -> Result<Value> {
    match word {
        Word::Path(path) => walk(dot, path, style),
        Word::Text(text) => Ok(text.as_str().into()),
        Word::Number(number) => Ok((*number).into()),
        Word::Group(stages, path) => walk(&evaluate(stages, dot, style)?, path, style),
        Word::Call(name) => call(name, &[], style),
    }
}

fn call(name: &str, values: &[Value], style: Style) -> Result<Value> {
    let encoded = |value: &Value| match style.indented {
        true => gojson::to_string_pretty(value),
        false => Ok(value.to_string()),
    };
    match (name, values) {
        ("json", [value]) => encoded(value)
            .map(Value::from)
            .map_err(|e| Fault::internal(format!("encode as JSON: {e}"))),
        ("len", [Value::Array(a)]) => Ok(a.len().into()),
        ("len", [Value::Object(o)]) => Ok(o.len().into()),
        ("len", [Value::String(s)]) => Ok(s.len().into()),
        ("len", [Value::Null]) => Ok(0.into()),
        ("join", [Value::Array(a), Value::String(by)]) => {
            Ok(a.iter().map(show).collect::<Vec<_>>().join(by).into())
        }
        ("println", values) => {
            Ok((values.iter().map(show).collect::<Vec<_>>().join(" ") + "\n").into())
        }
        ("true" | "false", []) => Ok((name == "true").into()),
        ("not", [value]) => Ok((!truthy(value)).into()),
        ("eq", [a, b]) => Ok((a == b).into()),
        ("ne", [a, b]) => Ok((a != b).into()),
        ("index", [value, keys @ ..]) => {
            keys.iter().try_fold(value.clone(), |value, key| match (&value, key) {
                (Value::Array(a), Value::Number(n)) => {
                    let item = n.as_u64().and_then(|n| a.get(usize::try_from(n).ok()?));
                    item.cloned().ok_or_else(|| Fault::invalid(format!("index out of range: {n}")))
                }
                // Go gives the zero value of what the map holds; ours hold texts.
                (Value::Object(o), Value::String(k)) => {
                    Ok(o.get(k).cloned().unwrap_or_else(|| "".into()))
                }
                _ => Err(Fault::invalid("can't index item of this type")),
            })
        }
        _ => Err(Fault::invalid(format!(
            "function {name:?} is not defined, or not for these values"
        ))),
    }
}

fn run(nodes: &[Node], dot: &Value, style: Style, out: &mut String) -> Result<()> {
    for node in nodes {
        match node {
            Node::Text(text) => out.push_str(text),
            Node::Print(stages) => match evaluate(stages, dot, style)? {
                Value::Null if style.lenient => {}
                value => out.push_str(&show(&value)),
            },
            Node::Range(stages, body) => match evaluate(stages, dot, style)? {
                Value::Array(items) => {
                    items.iter().try_for_each(|item| run(body, item, style, out))?
                }
                Value::Object(fields) => {
                    fields.values().try_for_each(|item| run(body, item, style, out))?
                }
                Value::Null => {}
                _ => return Err(Fault::invalid("range can't iterate over this value")),
            },
            Node::If(stages, then, otherwise) => {
                let chosen = if truthy(&evaluate(stages, dot, style)?) { then } else { otherwise };
                run(chosen, dot, style, out)?
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(template: &str, expected: Result<&str, &str>) {
        let value = serde_json::json!([
            {"id": "w1", "labels": {"a.b": "x", "c": "y"}, "platforms": [{"os": "linux"}, {"os": "other"}], "cdiDevices": null},
            {"id": "w2", "labels": {}, "platforms": [], "cdiDevices": null},
        ]);
        let rendered = render(template, &value).map_err(|f| f.message().to_owned());
        assert_eq!(rendered.as_deref().map_err(String::as_str), expected, "{template}");
    }

    #[test]
    fn what_is_not_there_is_nothing_where_values_leave_it_out() {
        let value = serde_json::json!({"Image": {"config": {"Env": ["A<1"]}}});
        let shown = |template: &str| render_indented(template, &value).unwrap();
        assert_eq!(shown("{{.Image.Config.User}}|{{.A.B}}"), "|");
        assert_eq!(shown("{{if .Image.Config.User}}x{{else}}y{{end}}{{range .A}}z{{end}}"), "y");
        assert_eq!(shown("{{json .Image.Config}}"), "{\n  \"Env\": [\n    \"A\\u003c1\"\n  ]\n}");
    }

    #[test]
    fn templates_that_scripts_use() {
        check(
            "json",
            Ok(&serde_json::json!([
                {"id": "w1", "labels": {"a.b": "x", "c": "y"}, "platforms": [{"os": "linux"}, {"os": "other"}], "cdiDevices": null},
                {"id": "w2", "labels": {}, "platforms": [], "cdiDevices": null},
            ])
            .to_string()),
        );
        check("{{range .}}{{.ID}}\n{{end}}", Ok("w1\nw2\n"));
        check("{{(index . 0).ID}}", Ok("w1"));
        check(r#"{{range .}}{{index .Labels "a.b"}};{{end}}"#, Ok("x;;"));
        check("{{len .}} {{json (index . 1).Platforms}}", Ok("2 []"));
        check(
            "{{range . -}}  {{if .Platforms}}{{(index .Platforms 0).OS}}{{else}}none{{end}} {{- end}}",
            Ok("linuxnone"),
        );
        check(
            "{{index . 0 | json}}",
            Ok(
                r#"{"id":"w1","labels":{"a.b":"x","c":"y"},"platforms":[{"os":"linux"},{"os":"other"}],"cdiDevices":null}"#,
            ),
        );
        check("{{range .}}", Err("1 blocks without end"));
        check("{{.X}}", Err("can't evaluate field X in a value that has none"));
        check("{{index . 7}}", Err("index out of range: 7"));
        check("{{", Err("unclosed action"));
        check("{{foo .}}", Err("function \"foo\" is not defined, or not for these values"));
    }
}
