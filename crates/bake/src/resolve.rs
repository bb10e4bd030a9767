//! From the blocks of all files to targets and groups: variables first, then functions, then
//! blocks, and before each of them what it asks for.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    rc::Rc,
    sync::LazyLock,
};

use hcl_edit::expr::Expression;
use shipway_gocompat::{csv_fields, parse_bool};

use crate::{
    Host, Variable,
    convert::convert,
    entry::{Attest, Cache, ListEntry, Output, Secret, Ssh},
    eval::{Evaluator, Scope, UserFunction},
    functions,
    json::Json,
    model::{BakeConfig, Group, Target, unique},
    names,
    number::Number,
    problem::{Outcome, Problem, SourceRange},
    source::{Attribute, Block, BlockBody, Expr, Source},
    types,
    value::{Type, Value},
};

/// Targets that one matrix makes, at most.
const MAX_MATRIX: usize = 10_000;

/// What is known of the definition beside its files.
pub(crate) struct EvalInputs<'g> {
    /// Built-in variables.
    pub(crate) builtins: &'g BTreeMap<String, String>,
    /// Values of `--var`.
    pub(crate) vars: &'g BTreeMap<String, String>,
    /// Whether the environment sets variables.
    pub(crate) use_env: bool,
}

struct VariableBlock<'a> {
    body: BlockBody<'a>,
    place: Option<SourceRange>,
    /// The type, once it was read.
    ty: Option<Type>,
}

/// What an attribute of a block becomes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Text,
    /// A text that is empty where it is not set, and never null.
    PlainText,
    Truth,
    Texts,
    /// A map of texts, which may be null.
    TextMap,
    /// A map of texts.
    PlainTextMap,
    Caches,
    Outputs,
    Secrets,
    Agents,
    Attests,
}

const TARGET: &[(&str, Shape)] = &[
    ("description", Shape::PlainText),
    ("inherits", Shape::Texts),
    ("annotations", Shape::Texts),
    ("attest", Shape::Attests),
    ("context", Shape::Text),
    ("contexts", Shape::PlainTextMap),
    ("dockerfile", Shape::Text),
    ("dockerfile-inline", Shape::Text),
    ("args", Shape::TextMap),
    ("labels", Shape::TextMap),
    ("tags", Shape::Texts),
    ("cache-from", Shape::Caches),
    ("cache-to", Shape::Caches),
    ("target", Shape::Text),
    ("secret", Shape::Secrets),
    ("ssh", Shape::Agents),
    ("platforms", Shape::Texts),
    ("output", Shape::Outputs),
    ("pull", Shape::Truth),
    ("no-cache", Shape::Truth),
    ("network", Shape::Text),
    ("no-cache-filter", Shape::Texts),
    ("shm-size", Shape::Text),
    ("ulimits", Shape::Texts),
    ("resources", Shape::PlainTextMap),
    ("call", Shape::Text),
    ("entitlements", Shape::Texts),
    ("extra-hosts", Shape::TextMap),
];

const GROUP: &[(&str, Shape)] = &[("description", Shape::PlainText), ("targets", Shape::Texts)];

/// What an attribute came to: as expressions see it, and as targets have it.
#[derive(Clone, Debug)]
enum Decoded {
    Text(Option<String>),
    Truth(Option<bool>),
    Texts(Option<Vec<String>>),
    TextMap(BTreeMap<String, Option<String>>),
    Caches(Option<Vec<Cache>>),
    Outputs(Option<Vec<Output>>),
    Secrets(Option<Vec<Secret>>),
    Agents(Option<Vec<Ssh>>),
    Attests(Option<Vec<Attest>>),
}

/// An attribute of the blocks of a kind.
struct AttributeSpec {
    name: &'static str,
    shape: Shape,
    /// What its value is converted to.
    ty: Type,
}

/// What the blocks of a kind may have.
struct Schema {
    attributes: Vec<AttributeSpec>,
    /// What expressions see of a block that sets nothing.
    unset: BTreeMap<String, Value>,
}

impl Schema {
    fn of(shapes: &'static [(&'static str, Shape)]) -> Self {
        let spec =
            |&(name, shape): &(&'static str, Shape)| AttributeSpec { name, shape, ty: shape.ty() };
        let attributes: Vec<AttributeSpec> = shapes.iter().map(spec).collect();
        let unset = |a: &AttributeSpec| match a.shape {
            Shape::PlainText => Value::string(""),
            _ => Value::Null(a.ty.clone()),
        };
        let unset = attributes.iter().map(|a| (a.name.to_owned(), unset(a))).collect();
        Self { attributes, unset }
    }

    /// That of blocks of the kind `kind`.
    fn for_kind(kind: &str) -> &'static Self {
        static GROUPS: LazyLock<Schema> = LazyLock::new(|| Schema::of(GROUP));
        static TARGETS: LazyLock<Schema> = LazyLock::new(|| Schema::of(TARGET));
        if kind == "group" { &GROUPS } else { &TARGETS }
    }
}

impl Shape {
    fn ty(self) -> Type {
        match self {
            Self::Text | Self::PlainText => Type::String,
            Self::Truth => Type::Bool,
            Self::Texts => Type::list(Type::String),
            Self::TextMap | Self::PlainTextMap => Type::map(Type::String),
            Self::Caches => Type::list(Cache::ty()),
            Self::Outputs => Type::list(Output::ty()),
            Self::Secrets => Type::list(Secret::ty()),
            Self::Agents => Type::list(Ssh::ty()),
            Self::Attests => Type::list(Attest::ty()),
        }
    }
}

impl AttributeSpec {
    /// What `value` becomes, and what expressions see of it.
    fn decode(&self, value: &Value) -> Result<(Decoded, Value), String> {
        fn entries<E: ListEntry>(
            value: &Value,
            ty: &Type,
        ) -> Result<(Option<Vec<E>>, Value), String> {
            let entries = E::of_value(value)?;
            let seen = entries.as_ref().map(|all| all.iter().map(E::value).collect());
            let seen = match (seen, ty) {
                (Some(all), Type::List(of)) => Value::list_of(of.clone(), all),
                _ => Value::Null(ty.clone()),
            };
            Ok((entries, seen))
        }
        const NULL: &str = "null value is not allowed";
        let ty = &self.ty;
        match self.shape {
            Shape::Caches => entries(value, ty).map(|(d, v)| (Decoded::Caches(d), v)),
            Shape::Outputs => entries(value, ty).map(|(d, v)| (Decoded::Outputs(d), v)),
            Shape::Secrets => entries(value, ty).map(|(d, v)| (Decoded::Secrets(d), v)),
            Shape::Agents => entries(value, ty).map(|(d, v)| (Decoded::Agents(d), v)),
            Shape::Attests => entries(value, ty).map(|(d, v)| (Decoded::Attests(d), v)),
            shape => {
                let value = convert(value, ty)?;
                let text = |v: &Value| v.as_str().map(str::to_owned);
                let decoded = match (shape, &value) {
                    (Shape::PlainText, Value::Null(_)) => return Err(NULL.into()),
                    (Shape::Text | Shape::PlainText, v) => Decoded::Text(text(v)),
                    (Shape::Truth, Value::Bool(b)) => Decoded::Truth(Some(*b)),
                    (Shape::Truth, _) => Decoded::Truth(None),
                    (Shape::Texts, Value::List(_, items)) => {
                        let texts = items.iter().map(|v| text(v).ok_or(NULL));
                        Decoded::Texts(Some(texts.collect::<Result<_, _>>()?))
                    }
                    (Shape::Texts, _) => Decoded::Texts(None),
                    (_, Value::Map(_, fields)) => {
                        if shape == Shape::PlainTextMap && fields.values().any(Value::is_null) {
                            return Err(NULL.into());
                        }
                        Decoded::TextMap(fields.iter().map(|(k, v)| (k.clone(), text(v))).collect())
                    }
                    _ => Decoded::TextMap(BTreeMap::new()),
                };
                Ok((decoded, value))
            }
        }
    }
}

/// One target or group that a block makes; a matrix makes several.
struct Instance {
    name: String,
    /// Variables of the matrix.
    scope: Vec<(String, Value)>,
    /// Attributes that were evaluated, or are being: these are `None`.
    attributes: Vec<(&'static str, Option<Decoded>)>,
}

struct BlockState<'a> {
    kind: &'static str,
    block: Block<'a>,
    instances: Vec<Instance>,
}

/// The state of an evaluation.
struct Resolver<'a> {
    eval: Evaluator<'a>,
    given: &'a EvalInputs<'a>,
    variables: BTreeMap<String, VariableBlock<'a>>,
    /// In the order of the files, for what is reported first.
    variable_order: Vec<String>,
    attributes: BTreeMap<String, Attribute<'a>>,
    functions: BTreeMap<String, (BlockBody<'a>, Option<SourceRange>)>,
    blocks: Vec<BlockState<'a>>,
    /// Blocks that make targets or groups of a name.
    by_name: HashMap<(&'static str, String), Vec<usize>>,
    variables_begun: HashSet<String>,
    functions_begun: HashSet<String>,
}

/// What evaluating all files came to.
pub(crate) struct Evaluated {
    pub(crate) variables: Vec<Variable>,
}

/// Evaluates `sources`, and adds their targets and groups to `config`.
pub(crate) fn resolve(
    sources: &[Source],
    host: &dyn Host,
    given: &EvalInputs<'_>,
    config: &mut BakeConfig,
) -> Outcome<Evaluated> {
    let mut resolver = Resolver {
        eval: Evaluator::new(host),
        given,
        variables: BTreeMap::new(),
        variable_order: Vec::new(),
        attributes: BTreeMap::new(),
        functions: BTreeMap::new(),
        blocks: Vec::new(),
        by_name: HashMap::new(),
        variables_begun: HashSet::new(),
        functions_begun: HashSet::new(),
    };
    let bodies: Vec<BlockBody<'_>> =
        sources.iter().enumerate().map(|(n, s)| s.body(n)).collect::<Outcome<_>>()?;
    resolver.collect(&bodies)?;
    resolver.run(config)
}

fn is_reserved(given: &EvalInputs<'_>, name: &str) -> bool {
    name == "target" || name == "group" || given.builtins.contains_key(name)
}

impl<'a> Resolver<'a> {
    fn collect(&mut self, bodies: &[BlockBody<'a>]) -> Outcome<()> {
        for body in bodies {
            for block in body.blocks("variable", 1)? {
                let name = block.labels[0];
                if is_reserved(self.given, name) {
                    continue;
                }
                let variable = VariableBlock { body: block.body, place: block.place, ty: None };
                if self.variables.insert(name.to_owned(), variable).is_none() {
                    self.variable_order.push(name.to_owned());
                }
            }
            for block in body.blocks("function", 1)? {
                let name = block.labels[0];
                if !is_reserved(self.given, name) {
                    self.functions.insert(name.to_owned(), (block.body, block.place));
                }
            }
            for kind in ["group", "target"] {
                for block in body.blocks(kind, 1)? {
                    self.blocks.push(BlockState { kind, block, instances: Vec::new() });
                }
            }
            for attribute in body.attributes() {
                let known = ["target", "group", "variable", "function"];
                if !is_reserved(self.given, attribute.name) && !known.contains(&attribute.name) {
                    self.attributes.insert(attribute.name.to_owned(), attribute);
                }
            }
        }
        Ok(())
    }

    fn run(mut self, config: &mut BakeConfig) -> Outcome<Evaluated> {
        for name in self.given.builtins.keys() {
            self.variable(name)?;
        }
        let mut variables = Vec::new();
        for name in self.variable_order.clone() {
            let place = self.variables.get(&name).and_then(|v| v.place.clone());
            self.variable(&name).map_err(|p| p.at(place))?;
            variables.push(self.described(&name)?);
        }
        for name in self.functions.keys().cloned().collect::<Vec<_>>() {
            let place = self.functions.get(&name).and_then(|(_, place)| place.clone());
            self.function(&name).map_err(|p| p.at(place))?;
        }
        for name in self.variable_order.clone() {
            self.validate(&name)?;
        }
        self.targets(config)?;
        for name in self.attributes.keys().cloned().collect::<Vec<_>>() {
            let place = self.attributes[&name].expr.place();
            self.variable(&name).map_err(|p| p.at(place))?;
        }
        Ok(Evaluated { variables })
    }

    /// Evaluates what `expr` asks for. With `lenient`, names that mean nothing are left to its
    /// evaluation.
    fn prepare(&mut self, expr: Expr<'a>, own: &[&str], lenient: bool) -> Outcome<()> {
        let asked = names::of(expr);
        let pass = |done: Outcome<()>| match done {
            Err(problem) if lenient && problem.undefined => Ok(()),
            other => other.map_err(|p| {
                // What stops looking ahead is a mistake there.
                let mut p = p.at(expr.place());
                p.undefined = false;
                p
            }),
        };
        for name in asked.functions {
            pass(self.function(name))?;
        }
        for (root, first, second) in asked.variables {
            if own.contains(&root) {
                continue;
            }
            let kind = match root {
                "target" if !self.is_variable(root) => Some("target"),
                "group" if !self.is_variable(root) => Some("group"),
                _ => None,
            };
            let Some(kind) = kind else {
                pass(self.variable(root))?;
                continue;
            };
            let Some(name) = first else {
                return Err(Problem::new(
                    "Invalid expression",
                    format!("cannot access {kind} as a variable"),
                )
                .at(expr.place()));
            };
            let blocks = self.by_name.get(&(kind, name.to_owned())).cloned().unwrap_or_default();
            for block in blocks {
                pass(self.block(block, second))?;
            }
        }
        Ok(())
    }

    fn is_variable(&self, name: &str) -> bool {
        self.eval.variables.borrow().contains_key(name)
    }

    /// Makes the function `name` known.
    fn function(&mut self, name: &str) -> Outcome<()> {
        if functions::exists(name) || self.eval.functions.borrow().contains_key(name) {
            return Ok(());
        }
        let Some((body, _)) = self.functions.get(name) else {
            return Err(Problem::undefined(format!("function {name:?} does not exist")));
        };
        let body = body.clone();
        if !self.functions_begun.insert(name.to_owned()) {
            return Err(Problem::plain(format!("function cycle not allowed for {name}")));
        }
        let result = body
            .attribute("result")
            .ok_or_else(|| Problem::plain(format!("empty result not allowed for {name}")))?;
        let params = body
            .attribute("params")
            .ok_or_else(|| Problem::plain(format!("empty params not allowed for {name}")))?;
        let bad =
            || Problem::new("Invalid param element", "Each parameter name must be an identifier.");
        let params: Vec<String> = match params.expr {
            Expr::Hcl(Expression::Array(list), source) => list
                .iter()
                .map(|e| keyword(e).ok_or_else(|| bad().at(Expr::Hcl(e, source).place())))
                .collect::<Outcome<_>>()?,
            Expr::Json(Json::Array(list), _) => list
                .iter()
                .map(|e| match e {
                    Json::Text(t) => Ok(t.raw.clone()),
                    _ => Err(bad()),
                })
                .collect::<Outcome<_>>()?,
            other => return Err(bad().at(other.place())),
        };
        let variadic = match body.attribute("variadic_params").map(|a| a.expr) {
            None => None,
            Some(Expr::Hcl(e, source)) => {
                Some(keyword(e).ok_or_else(|| bad().at(Expr::Hcl(e, source).place()))?)
            }
            Some(Expr::Json(Json::Text(t), _)) => Some(t.raw.clone()),
            Some(Expr::Json(..)) => return Err(bad()),
        };
        let own: Vec<&str> = params.iter().chain(&variadic).map(String::as_str).collect();
        self.deeper(|this| this.prepare(result.expr, &own, false))?;
        let function = UserFunction { params, variadic, result: result.expr };
        self.eval.functions.borrow_mut().insert(name.to_owned(), Rc::new(function));
        Ok(())
    }

    /// Does `work` one level deeper.
    fn deeper<T>(&mut self, work: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        self.eval.descend()?;
        let done = work(self);
        self.eval.ascend();
        done
    }

    fn lookup(&self, name: &str) -> Option<String> {
        let env = || self.eval.host.env(name).filter(|_| self.given.use_env);
        self.given.vars.get(name).cloned().or_else(env)
    }

    /// What a variable is set to from outside, and whether that is JSON.
    fn overridden(&self, name: &str, favor_json: bool) -> Option<(String, bool)> {
        let plain = self.lookup(name);
        if plain.is_none() || favor_json {
            let json = format!("{name}_JSON");
            if !self.variables.contains_key(&json)
                && !self.given.builtins.contains_key(&json)
                && let Some(text) = self.lookup(&json)
            {
                return Some((text, true));
            }
        }
        plain.map(|text| (text, false))
    }

    /// Evaluates the variable or global attribute `name`.
    fn variable(&mut self, name: &str) -> Outcome<()> {
        if self.eval.variables.borrow().contains_key(name) {
            return Ok(());
        }
        if !self.variables_begun.insert(name.to_owned()) {
            return Err(Problem::plain(format!("variable cycle not allowed for {name}")));
        }
        let value = match self.given.builtins.get(name) {
            Some(text) => Value::string(text.as_str()),
            None => self.deeper(|this| this.variable_value(name))?,
        };
        self.eval.variables.borrow_mut().insert(name.to_owned(), value);
        Ok(())
    }

    fn variable_value(&mut self, name: &str) -> Outcome<Value> {
        let (default, ty) = match self.attributes.get(name) {
            Some(attribute) => (Some(attribute.expr), None),
            None => {
                let Some(block) = self.variables.get(name) else {
                    return Err(Problem::undefined(format!("variable {name:?} does not exist")));
                };
                let ty = match block.body.attribute("type").map(|a| a.expr) {
                    None | Some(Expr::Json(Json::Null, _)) => None,
                    Some(Expr::Hcl(Expression::Null(_), _)) => None,
                    Some(expr) => Some(types::constraint(expr)?),
                };
                (block.body.attribute("default").map(|a| a.expr), ty)
            }
        };
        if let (Some(ty), Some(block)) = (&ty, self.variables.get_mut(name)) {
            block.ty = Some(ty.clone());
        }
        let overridden = self.overridden(name, ty.is_some());
        let mut value = match default {
            None if self.overridden(name, false).is_none() => {
                return Ok(match ty {
                    Some(ty) => Value::Null(ty),
                    None => Value::string(""),
                });
            }
            None => Value::NULL,
            Some(expr) => {
                self.prepare(expr, &[], true)?;
                let value = self.eval.value(expr, &Scope::default())?;
                match &ty {
                    Some(ty) => convert(&value, ty).map_err(|e| {
                        Problem::new(
                            "Invalid value",
                            format!("invalid type {ty} for variable {name} default value: {e}"),
                        )
                        .at(expr.place())
                    })?,
                    None => value,
                }
            }
        };
        let is_variable = self.variables.contains_key(name);
        if let Some((text, is_json)) = overridden.filter(|_| is_variable) {
            value = outside(name, &text, is_json, default.is_some(), &value, ty.as_ref())
                .map_err(|why| Problem::new("Invalid value", why))?;
        }
        Ok(value)
    }

    /// A variable as `--list` shows it.
    fn described(&self, name: &str) -> Outcome<Variable> {
        let block = &self.variables[name];
        let text = |attribute: &str| -> Outcome<String> {
            let Some(found) = block.body.attribute(attribute) else { return Ok(String::new()) };
            match found.expr {
                Expr::Json(Json::Text(t), _) => Ok(t.raw.clone()),
                expr => {
                    // Nothing is known here but the text itself.
                    let value = Evaluator::new(self.eval.host).value(expr, &Scope::default())?;
                    let value = convert(&value, &Type::String).map_err(|e| {
                        Problem::new("Unsuitable value type", format!("Unsuitable value: {e}"))
                            .at(expr.place())
                    })?;
                    Ok(value.as_str().unwrap_or_default().to_owned())
                }
            }
        };
        let value = self.eval.variables.borrow().get(name).cloned().unwrap_or(Value::NULL);
        let value = match &value {
            Value::Null(_) => None,
            Value::String(text) => Some(text.to_string()),
            other => Some(functions::encode(other)),
        };
        Ok(Variable {
            name: name.to_owned(),
            description: text("description")?,
            kind: block.ty.as_ref().map_or(String::new(), Type::constraint),
            value,
        })
    }

    fn validate(&mut self, name: &str) -> Outcome<()> {
        let body = self.variables[name].body.clone();
        for rule in body.blocks("validation", 0)? {
            let Some(condition) = rule.body.attribute("condition").map(|a| a.expr) else {
                return Err(Problem::new(
                    "Invalid condition result",
                    "Condition expression must return either true or false, not null.",
                )
                .at(rule.place));
            };
            self.prepare(condition, &[], true)?;
            let value = self.eval.value(condition, &Scope::default())?;
            let result = if value.is_null() {
                Err("Condition expression must return either true or false, not null.".to_owned())
            } else {
                convert(&value, &Type::Bool)
                    .map_err(|e| format!("Invalid condition result value: {e}"))
            };
            match result {
                Ok(Value::Bool(true)) => continue,
                Ok(_) => {}
                Err(why) => {
                    return Err(Problem::new("Invalid condition result", why).at(condition.place()));
                }
            }
            let message = match rule.body.attribute("error_message").map(|a| a.expr) {
                Some(expr) => {
                    self.prepare(expr, &[], true)?;
                    match self.eval.value(expr, &Scope::default())? {
                        Value::String(text) => text.to_string(),
                        _ => "This check failed, but has an invalid error message.".into(),
                    }
                }
                None => "This check failed, but has an invalid error message.".into(),
            };
            return Err(Problem::new("Validation failed", message).at(condition.place()));
        }
        Ok(())
    }
}

/// Names of targets and groups have these characters.
fn check_name(name: &str) -> Outcome<()> {
    let is_fine = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    match !name.is_empty() && name.chars().all(is_fine) {
        true => Ok(()),
        false => {
            let why = format!("{name:?}: only \"[a-zA-Z0-9_-]+\" are allowed");
            Err(Problem::new("Invalid name", why))
        }
    }
}

/// Where in a list things are, by their names, each of which is there once.
#[derive(Default)]
struct Places(HashMap<String, usize>);

impl Places {
    fn of<'n>(names: impl Iterator<Item = &'n String>) -> Self {
        Self(names.enumerate().map(|(at, name)| (name.clone(), at)).collect())
    }

    /// The place of `name`; `None` if it is new, and comes next.
    fn place(&mut self, name: &str) -> Option<usize> {
        let next = self.0.len();
        let known = self.0.get(name).copied();
        if known.is_none() {
            self.0.insert(name.to_owned(), next);
        }
        known
    }
}

/// Targets and groups.
impl<'a> Resolver<'a> {
    fn targets(&mut self, config: &mut BakeConfig) -> Outcome<()> {
        for n in 0..self.blocks.len() {
            let place = self.blocks[n].block.place.clone();
            let instances = self.instances(n).map_err(|p| p.at(place))?;
            self.blocks[n].instances = instances;
        }
        for (n, state) in self.blocks.iter().enumerate() {
            for instance in &state.instances {
                let key = (state.kind, instance.name.clone());
                self.by_name.entry(key).or_default().push(n);
            }
        }
        for n in 0..self.blocks.len() {
            let place = self.blocks[n].block.place.clone();
            self.block(n, None).map_err(|p| p.at(place))?;
        }
        let mut renamed: Vec<(String, Vec<String>)> = Vec::new();
        let mut labels = Places::default();
        let mut groups = Places::of(config.groups.iter().map(|g| &g.name));
        let mut targets = Places::of(config.targets.iter().map(|t| &t.name));
        // The blocks stay: global attributes may ask for what they set.
        for state in &mut self.blocks {
            let label = state.block.labels[0];
            if state.kind == "target" {
                let names = state.instances.iter().map(|i| i.name.clone());
                match labels.place(label) {
                    Some(at) => renamed[at].1.extend(names),
                    None => renamed.push((label.to_owned(), names.collect())),
                }
            }
            for instance in std::mem::take(&mut state.instances) {
                match state.kind {
                    "group" => {
                        let group = instance.into_group();
                        match groups.place(&group.name) {
                            Some(at) => config.groups[at] = group,
                            None => config.groups.push(group),
                        }
                    }
                    _ => {
                        let target = instance.into_target();
                        match targets.place(&target.name) {
                            Some(at) => config.targets[at].merge(&target),
                            None => config.targets.push(target),
                        }
                    }
                }
            }
        }
        // The targets of a matrix are a group of its label.
        for (label, names) in renamed {
            let names = unique(&names);
            if names.as_slice() != [label.clone()] {
                let group = Group { name: label, targets: names, ..Group::default() };
                config.groups.push(group);
            }
        }
        Ok(())
    }

    /// What a block makes: one target or group, or those of its matrix.
    fn instances(&mut self, n: usize) -> Outcome<Vec<Instance>> {
        let (kind, body) = (self.blocks[n].kind, self.blocks[n].block.body.clone());
        let label = self.blocks[n].block.labels[0];
        let of = |name: String, scope| Instance { name, scope, attributes: Vec::new() };
        let (matrix, name) = (body.attribute("matrix"), body.attribute("name"));
        if kind == "group" {
            if matrix.is_some() {
                return Err(Problem::plain("matrix is not supported for groups"));
            }
            check_name(label)?;
            if name.is_some() {
                return Err(Problem::plain("name is not supported for groups"));
            }
            return Ok(vec![of(label.to_owned(), Vec::new())]);
        }
        let scopes = match &matrix {
            Some(matrix) => self.matrix(matrix.expr)?,
            None => vec![Vec::new()],
        };
        check_name(label)?;
        let mut instances: Vec<Instance> = Vec::new();
        let mut seen = HashSet::new();
        for scope in scopes {
            let name = match &name {
                None => label.to_owned(),
                Some(_) if matrix.is_none() => return Err(Problem::plain("name requires matrix")),
                Some(name) => {
                    let own: Vec<String> = scope.iter().map(|(n, _)| n.clone()).collect();
                    let own: Vec<&str> = own.iter().map(String::as_str).collect();
                    self.prepare(name.expr, &own, true)?;
                    let scope = Scope { names: scope.clone(), parent: None };
                    let value = self.eval.value(name.expr, &scope)?;
                    match convert(&value, &Type::String).map_err(Problem::plain)? {
                        Value::String(text) => text.to_string(),
                        _ => return Err(Problem::plain("the name must not be null")),
                    }
                }
            };
            check_name(&name)?;
            if !seen.insert(name.clone()) {
                return Err(Problem::new("Invalid name", format!("duplicate name {name:?}")));
            }
            instances.push(of(name, scope));
        }
        Ok(instances)
    }

    /// All combinations of the values of a matrix.
    fn matrix(&mut self, expr: Expr<'a>) -> Outcome<Vec<Vec<(String, Value)>>> {
        self.prepare(expr, &[], true)?;
        let value = self.eval.value(expr, &Scope::default())?;
        let fields = value
            .mapping()
            .ok_or_else(|| Problem::plain("matrix must be a map").at(expr.place()))?;
        let mut scopes: Vec<Vec<(String, Value)>> = vec![Vec::new()];
        for (name, values) in fields.iter() {
            let values: Vec<Value> = match (values.sequence(), values.mapping()) {
                (Some(items), _) => items.to_vec(),
                (_, Some(fields)) => fields.values().cloned().collect(),
                _ => {
                    let problem = Problem::plain("matrix values must be a list");
                    return Err(problem.at(expr.place()));
                }
            };
            if scopes.len().saturating_mul(values.len()) > MAX_MATRIX {
                let why = format!("the matrix makes more than {MAX_MATRIX} targets");
                return Err(Problem::plain(why).at(expr.place()));
            }
            scopes = values
                .iter()
                .flat_map(|v| {
                    scopes
                        .iter()
                        .map(|s| s.iter().cloned().chain([(name.clone(), v.clone())]).collect())
                })
                .collect();
        }
        Ok(scopes)
    }

    /// Evaluates `only` of a block, or all that is left to evaluate of it.
    fn block(&mut self, n: usize, only: Option<&str>) -> Outcome<()> {
        let kind = self.blocks[n].kind;
        let schema = Schema::for_kind(kind);
        let body = self.blocks[n].block.body.clone();
        for i in 0..self.blocks[n].instances.len() {
            let name = self.blocks[n].instances[i].name.clone();
            self.eval.see(kind, &schema.unset, |blocks| blocks.begin(&name));
            let asked = |a: &&AttributeSpec| only.is_none_or(|only| only == a.name);
            for attribute in schema.attributes.iter().filter(asked) {
                match self.blocks[n].instances[i].get(attribute.name) {
                    Some(Some(_)) => continue,
                    Some(None) => {
                        return Err(Problem::plain(format!(
                            "reference cycle not allowed for {kind}.{name}.{}",
                            attribute.name
                        )));
                    }
                    None => {}
                }
                let Some(found) = body.attribute(attribute.name) else {
                    if kind == "group" && attribute.name == "targets" {
                        return Err(Problem::new(
                            "Missing required argument",
                            "The argument \"targets\" is required, but no definition was found.",
                        ));
                    }
                    continue;
                };
                let instance = &mut self.blocks[n].instances[i];
                let at = instance.attributes.len();
                instance.attributes.push((attribute.name, None));
                let names = instance.scope.clone();
                let own: Vec<String> = names.iter().map(|(n, _)| n.clone()).collect();
                let own: Vec<&str> = own.iter().map(String::as_str).collect();
                self.deeper(|this| this.prepare(found.expr, &own, true))?;
                let value = self.eval.value(found.expr, &Scope { names, parent: None })?;
                let (decoded, seen) = attribute.decode(&value).map_err(|why| {
                    Problem::new("Unsuitable value type", format!("Unsuitable value: {why}"))
                        .at(found.expr.place())
                })?;
                self.blocks[n].instances[i].attributes[at].1 = Some(decoded);
                self.eval
                    .see(kind, &schema.unset, |blocks| blocks.set(&name, attribute.name, seen));
            }
        }
        Ok(())
    }
}

impl Instance {
    /// What is known of an attribute; `None` inside if it is being evaluated.
    fn get(&self, name: &str) -> Option<&Option<Decoded>> {
        self.attributes.iter().find(|(n, _)| *n == name).map(|(_, decoded)| decoded)
    }

    fn take(&mut self, name: &str) -> Option<Decoded> {
        self.attributes.iter_mut().find(|(n, _)| *n == name)?.1.take()
    }

    fn text(&mut self, name: &str) -> Option<String> {
        match self.take(name) {
            Some(Decoded::Text(text)) => text,
            _ => None,
        }
    }

    fn truth(&mut self, name: &str) -> Option<bool> {
        match self.take(name) {
            Some(Decoded::Truth(truth)) => truth,
            _ => None,
        }
    }

    fn texts(&mut self, name: &str) -> Option<Vec<String>> {
        match self.take(name) {
            Some(Decoded::Texts(texts)) => texts,
            _ => None,
        }
    }

    fn map(&mut self, name: &str) -> BTreeMap<String, Option<String>> {
        match self.take(name) {
            Some(Decoded::TextMap(map)) => map,
            _ => BTreeMap::new(),
        }
    }

    fn plain_map(&mut self, name: &str) -> BTreeMap<String, String> {
        self.map(name).into_iter().filter_map(|(k, v)| Some((k, v?))).collect()
    }

    fn caches(&mut self, name: &str) -> Option<Vec<Cache>> {
        match self.take(name) {
            Some(Decoded::Caches(caches)) => caches,
            _ => None,
        }
    }

    fn into_group(mut self) -> Group {
        Group {
            description: self.text("description").unwrap_or_default(),
            targets: self.texts("targets").unwrap_or_default(),
            name: self.name,
        }
    }

    fn into_target(mut self) -> Target {
        Target {
            description: self.text("description").unwrap_or_default(),
            inherits: self.texts("inherits").unwrap_or_default(),
            annotations: self.texts("annotations"),
            attest: match self.take("attest") {
                Some(Decoded::Attests(attests)) => attests,
                _ => None,
            },
            context: self.text("context"),
            contexts: self.plain_map("contexts"),
            dockerfile: self.text("dockerfile"),
            dockerfile_inline: self.text("dockerfile-inline"),
            args: self.map("args"),
            labels: self.map("labels"),
            tags: self.texts("tags"),
            cache_from: self.caches("cache-from"),
            cache_to: self.caches("cache-to"),
            target: self.text("target"),
            secrets: match self.take("secret") {
                Some(Decoded::Secrets(secrets)) => secrets,
                _ => None,
            },
            ssh: match self.take("ssh") {
                Some(Decoded::Agents(agents)) => agents,
                _ => None,
            },
            platforms: self.texts("platforms"),
            outputs: match self.take("output") {
                Some(Decoded::Outputs(outputs)) => outputs,
                _ => None,
            },
            pull: self.truth("pull"),
            no_cache: self.truth("no-cache"),
            network: self.text("network"),
            no_cache_filter: self.texts("no-cache-filter"),
            shm_size: self.text("shm-size"),
            ulimits: self.texts("ulimits"),
            resources: self.plain_map("resources"),
            call: self.text("call"),
            entitlements: self.texts("entitlements"),
            extra_hosts: self.map("extra-hosts"),
            name: self.name,
            linked: false,
        }
    }
}

/// The name that an expression is, if it is nothing more.
fn keyword(expression: &Expression) -> Option<String> {
    match expression {
        Expression::Variable(name) => Some(name.as_str().to_owned()),
        _ => None,
    }
}

/// What a variable is set to from outside, as its type or that of its default has it.
fn outside(
    name: &str,
    text: &str,
    is_json: bool,
    has_default: bool,
    default: &Value,
    ty: Option<&Type>,
) -> Result<Value, String> {
    match ty {
        Some(ty) if is_json => {
            let json: Json = serde_json::from_str(text)
                .map_err(|e| format!("failed to convert variable {name} from JSON: {e}"))?;
            convert(&functions::value_of(&json), ty)
                .map_err(|e| format!("failed to convert variable {name} from JSON: {e}"))
        }
        Some(ty @ (Type::List(_) | Type::Set(_) | Type::Tuple(_) | Type::Map(_))) => {
            of_csv(name, text, ty)
                .map_err(|e| format!("failed to convert variable {name} from CSV: {e}"))
        }
        Some(ty) if ty.is_primitive() => primitive(name, text, ty),
        Some(Type::Dynamic) | None => match default.ty() {
            _ if !has_default => Ok(Value::string(text)),
            Type::Dynamic => Ok(Value::string(text)),
            ty if ty.is_primitive() => primitive(name, text, &ty),
            ty => Err(format!("unsupported type {ty} for variable {name}")),
        },
        Some(ty) => Err(format!("unsupported type {ty} for variable {name}")),
    }
}

fn primitive(name: &str, text: &str, ty: &Type) -> Result<Value, String> {
    match ty {
        Type::String => Ok(Value::string(text)),
        Type::Bool => parse_bool(text)
            .map(Value::Bool)
            .ok_or_else(|| format!("failed to parse {name} as bool: {text:?} is not a valid bool")),
        Type::Number => Number::parse(text).map(Value::Number).ok_or_else(|| {
            format!("failed to parse {name} as number: {text:?} is not a valid number")
        }),
        _ => Err(format!("{name} of type {ty} is not a primitive")),
    }
}

fn of_csv(name: &str, text: &str, ty: &Type) -> Result<Value, String> {
    let fields = csv_fields(text, ',').map_err(|_| format!("failed to parse {text} as CSV"))?;
    let unsupported = || format!("unsupported type {ty} for CSV specification");
    let each = |of: &Type| -> Result<Vec<Value>, String> {
        if !of.is_primitive() {
            return Err(unsupported());
        }
        fields
            .iter()
            .map(|f| {
                primitive(name, f, of)
                    .map_err(|e| format!("failed to parse element of type {ty}: {e}"))
            })
            .collect()
    };
    match ty {
        Type::List(of) => Ok(Value::list((**of).clone(), each(of)?)),
        Type::Set(of) => Ok(Value::set((**of).clone(), each(of)?)),
        Type::Tuple(types) => {
            if types.len() != fields.len() {
                return Err(format!(
                    "{ty} expects {} elements but only {} provided",
                    types.len(),
                    fields.len()
                ));
            }
            let values = types.iter().zip(&fields).map(|(of, f)| match of.is_primitive() {
                true => primitive(name, f, of),
                false => Err(unsupported()),
            });
            Ok(Value::tuple(values.collect::<Result<_, _>>()?))
        }
        Type::Map(of) if of.is_primitive() => {
            let mut map = BTreeMap::new();
            for field in &fields {
                let pair = csv_fields(field, ':')
                    .map_err(|_| format!("failed to parse {field} as k/v for variable {name}"))?;
                let [key, value] = pair.as_slice() else {
                    return Err(format!(
                        "expected one k/v pair but got {} pieces from {field}",
                        pair.len()
                    ));
                };
                map.insert(key.clone(), primitive(name, value, of)?);
            }
            Ok(Value::map((**of).clone(), map))
        }
        _ => Err(unsupported()),
    }
}
