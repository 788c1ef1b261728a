#include "decode.h"

#include <algorithm>
#include <map>
#include <sstream>

namespace rdna {
namespace {

bool starts(const std::string& s, const char* with) { return s.rfind(with, 0) == 0; }

std::string trim(const std::string& s) {
  const size_t a = s.find_first_not_of(" \t"), b = s.find_last_not_of(" \t");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

int64_t number(const std::string& s) {
  size_t used = 0;
  const int64_t v =
      static_cast<int64_t>(s[0] == '-' ? std::stoll(s, &used, 0) : static_cast<long long>(std::stoull(s, &used, 0)));
  if (used != s.size()) fault("number expected, found '", s, "'");
  return v;
}

// "[1,0,1]" -> its numbers
std::vector<int> list(const std::string& s) {
  std::vector<int> r;
  std::stringstream in(s.substr(1, s.size() - 2));
  for (std::string part; std::getline(in, part, ',');) r.push_back(static_cast<int>(number(part)));
  return r;
}

// Operands by commas, and modifiers by spaces after the last one; brackets keep together.
struct Text {
  std::string name;
  std::vector<std::string> operands;
  std::map<std::string, std::string> modifiers;  // name -> what follows its colon
};

Text split(const std::string& text) {
  Text t;
  const size_t space = text.find_first_of(" \t");
  t.name = text.substr(0, space);
  std::string rest = space == std::string::npos ? "" : trim(text.substr(space));
  std::vector<std::string> parts;  // by commas
  int depth = 0;
  std::string part;
  for (char c : rest) {
    if (c == '[' || c == '(') depth++;
    if (c == ']' || c == ')') depth--;
    if (c == ',' && depth == 0) {
      parts.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trim(part).empty()) parts.push_back(trim(part));
  if (parts.empty()) return t;
  // the last part: its operand, then modifiers
  std::stringstream last(parts.back());
  parts.pop_back();
  std::string word;
  bool first = true;
  while (last >> word) {
    const bool modifier =
        !first || (parts.empty() && word.find(':') != std::string::npos && word[0] != 'v' && word[0] != 's');
    if (modifier) {
      const size_t colon = word.find(':');
      t.modifiers[word.substr(0, colon)] = colon == std::string::npos ? "" : word.substr(colon + 1);
    } else {
      parts.push_back(word);
    }
    first = false;
  }
  t.operands = parts;
  return t;
}

Operand parse_operand(std::string s) {
  Operand o;
  o.text = s;
  if (starts(s, "neg(")) {
    o.neg = true;
    s = s.substr(4, s.size() - 5);
  }
  if (s[0] == '-' && s.size() > 1 && !std::isdigit(static_cast<unsigned char>(s[1]))) {
    o.neg = true;
    s = s.substr(1);
  }
  if (s[0] == '|') {
    o.abs = true;
    s = s.substr(1, s.size() - 2);
  }
  static const std::map<std::string, std::pair<int, int>> kNamed = {
      {"vcc_lo", {kVcc, 1}},   {"vcc_hi", {kVcc + 1, 1}},   {"vcc", {kVcc, 2}},
      {"exec_lo", {kExec, 1}}, {"exec_hi", {kExec + 1, 1}}, {"exec", {kExec, 2}},
      {"m0", {kM0, 1}},        {"null", {kNull, 1}},        {"src_scc", {kScc, 1}}};
  if (s == "off") {
    o.kind = Operand::kOff;
  } else if (const auto named = kNamed.find(s); named != kNamed.end()) {
    o.kind = Operand::kScalar;
    o.reg = static_cast<uint16_t>(named->second.first);
    o.count = static_cast<uint16_t>(named->second.second);
  } else if (s == "src_shared_base" || s == "src_private_base") {
    o.kind = Operand::kConstant;
    o.value = uint64_t{s == "src_shared_base" ? kSharedAperture : kPrivateAperture} << 32;
  } else if ((s[0] == 'v' || s[0] == 's') && s.size() > 1 &&
             (std::isdigit(static_cast<unsigned char>(s[1])) || s[1] == '[')) {
    o.kind = s[0] == 'v' ? Operand::kVector : Operand::kScalar;
    if (s[1] == '[') {
      const size_t colon = s.find(':');
      o.reg = static_cast<uint16_t>(number(s.substr(2, colon - 2)));
      o.count = static_cast<uint16_t>(number(s.substr(colon + 1, s.size() - colon - 2)) - o.reg + 1);
    } else {
      o.reg = static_cast<uint16_t>(number(s.substr(1)));
    }
  } else if (s.find('.') != std::string::npos) {
    o.kind = Operand::kConstant;
    o.is_float = true;
    o.real = std::stod(s);
  } else if (std::isdigit(static_cast<unsigned char>(s[0])) || s[0] == '-') {
    o.kind = Operand::kConstant;
    o.value = static_cast<uint64_t>(number(s));
  } else {
    fault("operand '", s, "' is not known");
  }
  return o;
}

// A constant's bits, now that its type is known. Literals of 32 bits are the upper half of a double.
void bind_constant(Operand& o, Type type) {
  if (o.kind != Operand::kConstant) return;
  const bool literal = starts(o.text, "0x") || starts(o.text, "-0x");
  if (o.is_float) {
    const float f = static_cast<float>(o.real);
    if (type == Type::kF64 || type == Type::kU64 || type == Type::kI64) {
      std::memcpy(&o.value, &o.real, 8);
    } else if (type == Type::kF16 || type == Type::kU16 || type == Type::kI16) {
      o.value = float_to_half(f);
    } else {
      o.value = 0;
      std::memcpy(&o.value, &f, 4);
    }
  } else if (type == Type::kF64) {
    if (literal) o.value <<= 32;
  } else if (type == Type::kI64) {
    if (literal) o.value = static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(o.value)));
  }
}

std::string base_name(std::string name) {
  for (const char* suffix : {"_e64_dpp", "_dpp", "_e32", "_e64"}) {
    const std::string s = suffix;
    if (name.size() > s.size() && name.compare(name.size() - s.size(), s.size(), s) == 0)
      return name.substr(0, name.size() - s.size());
  }
  return name;
}

uint8_t take_bits(Text& t, const char* name, uint8_t standard) {
  const auto m = t.modifiers.find(name);
  if (m == t.modifiers.end()) return standard;
  uint8_t bits = 0;
  const std::vector<int> values = list(m->second);
  for (size_t i = 0; i < values.size(); i++) bits = static_cast<uint8_t>(bits | values[i] << i);
  t.modifiers.erase(m);
  return bits;
}

bool take(Text& t, const char* name, std::string* value = nullptr) {
  const auto m = t.modifiers.find(name);
  if (m == t.modifiers.end()) return false;
  if (value != nullptr) *value = m->second;
  t.modifiers.erase(m);
  return true;
}

// Where each lane's first operand comes from.
bool take_dpp(Text& t, Instruction& in) {
  std::string v;
  int source[kLanes];
  bool found = true;
  const auto fill = [&](auto f) {
    for (int l = 0; l < kLanes; l++) source[l] = f(l);
  };
  if (take(t, "quad_perm", &v)) {
    const std::vector<int> p = list(v);
    fill([&](int l) { return (l & ~3) + p[static_cast<size_t>(l & 3)]; });
  } else if (take(t, "dpp8", &v)) {
    const std::vector<int> p = list(v);
    fill([&](int l) { return (l & ~7) + p[static_cast<size_t>(l & 7)]; });
  } else if (take(t, "row_shl", &v)) {
    fill([n = number(v)](int l) { return (l & 15) + n < 16 ? static_cast<int>(l + n) : -1; });
  } else if (take(t, "row_shr", &v)) {
    fill([n = number(v)](int l) { return (l & 15) - n >= 0 ? static_cast<int>(l - n) : -1; });
  } else if (take(t, "row_ror", &v)) {
    fill([n = number(v)](int l) { return (l & 16) + static_cast<int>(((l & 15) - n) & 15); });
  } else if (take(t, "row_mirror")) {
    fill([](int l) { return l ^ 15; });
  } else if (take(t, "row_half_mirror")) {
    fill([](int l) { return l ^ 7; });
  } else if (take(t, "row_share", &v)) {
    fill([n = number(v)](int l) { return (l & 16) + static_cast<int>(n); });
  } else if (take(t, "row_xmask", &v)) {
    fill([n = number(v)](int l) { return l ^ static_cast<int>(n); });
  } else {
    found = false;
  }
  if (!found) return false;
  for (int l = 0; l < kLanes; l++) in.lane_source[static_cast<size_t>(l)] = static_cast<int8_t>(source[l]);
  uint32_t rows = 0xf, banks = 0xf;
  if (take(t, "row_mask", &v)) rows = static_cast<uint32_t>(number(v));
  if (take(t, "bank_mask", &v)) banks = static_cast<uint32_t>(number(v));
  in.write_lanes = 0;
  for (int l = 0; l < kLanes; l++) {
    if ((rows >> (l / 16) & 1) && (banks >> (l % 16 / 4) & 1)) in.write_lanes |= 1u << l;
  }
  in.bound_ctrl = take(t, "bound_ctrl", &v) && v != "0";
  in.fetch_inactive = take(t, "fi", &v) && v == "1";
  return true;
}

void add_registers(RegisterSet& set, const Operand& o) {
  if (o.kind == Operand::kVector || o.kind == Operand::kScalar) set.add(o.kind == Operand::kVector, o.reg, o.count);
}

void set_counter(Instruction& in, const std::string& name) {
  using I = Instruction;
  if (starts(name, "ds_")) in.counter = I::kShared;
  if (starts(name, "s_load")) in.counter = I::kScalarMemory;
  if (starts(name, "flat_")) in.counter = I::kFlat;
  if (starts(name, "global_") && in.dst.kind != Operand::kNone) in.counter = I::kVectorLoad;
  if (in.counter == I::kNoCounter) {
    add_registers(in.uses, in.dst);
  } else {
    add_registers(in.defines, in.dst);
  }
}

void parse_wait(Instruction& in, const std::string& text) {
  in.offset = in.offset1 = 1 << 20;
  const auto field = [&](const char* name) {
    const size_t at = text.find(name);
    return at == std::string::npos ? 1 << 20 : std::stoi(text.substr(at + std::string(name).size()));
  };
  if (text.find("cnt(") == std::string::npos) fault("s_waitcnt without names is not modelled");
  in.offset = field("vmcnt(");
  in.offset1 = field("lgkmcnt(");
}

Instruction decode_one(const std::string& text, uint32_t word, const Operations& operations) {
  Instruction in;
  in.text = text;
  const std::string name = base_name(text.substr(0, text.find_first_of(" \t")));
  std::string lookup = starts(name, "v_dual_") ? "v_" + name.substr(7) : name;
  const Operation* op = operations.find(lookup);
  if (op == nullptr) fault("instruction '", name, "' is not modelled");
  in.run = op->run;
  in.klass = op->klass;
  if (op->klass == Class::kWait) {
    if (name == "s_waitcnt") parse_wait(in, text);
    return in;
  }
  if (op->klass == Class::kOther || op->klass == Class::kBarrier) return in;  // hints: their text is not looked at
  Text t = split(text);
  if (starts(name, "s_cbranch") || name == "s_branch") {
    in.offset = static_cast<int16_t>(number(t.operands.at(0)));
    if (op->reads != 0) in.uses.add(false, op->reads, 1);
    return in;
  }
  std::vector<Operand> operands;
  for (const std::string& s : t.operands) operands.push_back(parse_operand(s));
  size_t results = static_cast<size_t>(op->results), sources = op->types.size();
  if (op->klass == Class::kAtomic && (in.glc = t.modifiers.count("glc") > 0)) results = 1;
  if (name.rfind("v_dual_", 0) != 0 && op->klass == Class::kValu && starts(name, "v_cmpx") &&
      operands.size() == sources + 1) {
    operands.erase(operands.begin());  // some disassemblers write EXEC out
  }
  if (op->reads_result) sources--;
  if (op->reads != 0 && operands.size() + 1 == results + sources) {  // VCC that is not written out
    Operand implicit;
    implicit.kind = Operand::kScalar;
    implicit.reg = op->reads;
    operands.push_back(implicit);
  }
  if (operands.size() != results + sources) {
    fault(std::to_string(results + sources), " operands expected, found ", std::to_string(operands.size()));
  }
  if (op->reads_result) operands.push_back(operands[0]);
  if (results > 0) in.dst = operands[0];
  if (results > 1) in.dst2 = operands[1];
  for (size_t k = 0; k + results < operands.size(); k++) {
    in.src[k] = operands[results + k];
    bind_constant(in.src[k], op->types[k]);
    add_registers(in.uses, in.src[k]);
  }
  if (starts(name, "s_movk") || starts(name, "s_addk") || starts(name, "s_mulk") ||
      (starts(name, "s_cmpk") && name.back() == '2' && name[name.size() - 3] == 'i')) {
    for (Operand& o : in.src) {
      if (o.kind == Operand::kConstant) o.value = static_cast<uint32_t>(static_cast<int16_t>(o.value));
    }
  }
  add_registers(in.uses, in.dst2);
  if (op->writes != 0) in.uses.add(false, op->writes, 1);
  set_counter(in, name);

  const bool is_memory =
      in.counter != Instruction::kNoCounter || op->klass == Class::kStore || op->klass == Class::kAtomic;
  std::string v;
  if (take(t, "offset", &v)) {  // of ds_swizzle it is written as a pattern
    in.offset = starts(name, "ds_swizzle") ? static_cast<int32_t>(word & 0xffff) : static_cast<int32_t>(number(v));
  }
  if (take(t, "offset0", &v)) in.offset = static_cast<int32_t>(number(v));
  if (take(t, "offset1", &v)) in.offset1 = static_cast<int32_t>(number(v));
  if (is_memory) {
    for (const char* hint : {"glc", "slc", "dlc"}) take(t, hint);
  }
  in.clamp = take(t, "clamp");
  if (in.clamp && !op->clamps) fault("clamp is not modelled here");
  // a list one longer than the sources ends in the result's bit
  if (const auto m = t.modifiers.find("op_sel"); m != t.modifiers.end()) {
    const std::vector<int> bits = list(m->second);
    for (size_t k = 0; k < bits.size(); k++) {
      const size_t bit = k >= sources && !starts(name, "v_fma_mix") ? 3 : k;
      in.op_sel = static_cast<uint8_t>(in.op_sel | bits[k] << bit);
    }
    t.modifiers.erase(m);
  }
  in.op_sel_hi = take_bits(t, "op_sel_hi", starts(name, "v_fma_mix") ? 0 : 7);
  in.neg_lo = take_bits(t, "neg_lo", 0);
  in.neg_hi = take_bits(t, "neg_hi", 0);
  if (take_dpp(t, in)) {
    if (in.src[0].kind != Operand::kVector || starts(name, "v_cmpx") || in.src[0].count != 1)
      fault("this use of DPP is not modelled");
    in.inner = in.run;
    in.run = run_dpp;
  }
  if (!t.modifiers.empty()) fault("modifier '", t.modifiers.begin()->first, "' is not modelled");
  return in;
}

// Both halves read before either writes. One after the other does that unless each reads what the other writes.
void run_swap(Wave& w, const Instruction& in) {
  const Instruction& second = w.group->kernel->code[static_cast<size_t>(in.second)];
  uint32_t before[kLanes], first[kLanes];
  uint32_t* d = w.v[in.dst.reg];
  std::memcpy(before, d, sizeof before);
  in.inner(w, in);
  std::memcpy(first, d, sizeof first);
  std::memcpy(d, before, sizeof before);
  second.run(w, second);
  std::memcpy(d, first, sizeof first);
}
void run_pair(Wave& w, const Instruction& in) {
  const Instruction& second = w.group->kernel->code[static_cast<size_t>(in.second)];
  in.inner(w, in);
  second.run(w, second);
}

bool reads(const Instruction& in, const Operand& d) {
  return std::any_of(std::begin(in.src), std::end(in.src),
                     [&](const Operand& o) { return o.kind == Operand::kVector && o.reg == d.reg; });
}

}  // namespace

std::vector<Instruction> decode(const std::string& disassembly, const Operations& operations) {
  std::vector<Instruction> code, halves;
  std::stringstream lines(disassembly);
  for (std::string line; std::getline(lines, line);) {
    const size_t comment = line.find("// ");
    if (line.empty() || line[0] != '\t' || comment == std::string::npos) continue;
    const std::string text = trim(line.substr(0, comment));
    if (text == "s_code_end" || text == "v_illegal") continue;
    try {
      const size_t colon = line.find(':', comment);
      const auto first_word = static_cast<uint32_t>(std::stoul(line.substr(colon + 1), nullptr, 16));
      Instruction in;
      const size_t dual = text.find(" :: ");
      if (dual == std::string::npos) {
        in = decode_one(text, first_word, operations);
      } else {
        Instruction x = decode_one(trim(text.substr(0, dual)), 0, operations),
                    y = decode_one(trim(text.substr(dual + 4)), 0, operations);
        const bool x_first = !reads(y, x.dst), y_first = !reads(x, y.dst);
        if (!x_first && y_first) std::swap(x, y);
        RegisterSet uses = x.uses;
        uses |= y.uses;
        in = x;
        in.inner = x.run;
        in.run = x_first || y_first ? run_pair : run_swap;
        in.text = text;
        in.uses = uses;
        in.klass = Class::kDual;
        in.second = static_cast<int>(halves.size());
        halves.push_back(y);
      }
      in.address = std::stoull(line.substr(comment + 3, colon - comment - 3), nullptr, 16);
      std::stringstream words(line.substr(colon + 1));
      in.size = 0;
      for (std::string word; words >> word && word[0] != '<';) in.size += 4;
      in.index = static_cast<uint32_t>(code.size());
      code.push_back(in);
    } catch (const std::exception& f) {  // a Fault, or a number that is none
      fault(f.what(), " in '", text, "' (", trim(line.substr(comment + 3)), ")");
    }
  }
  // Branches name an address; the second halves of dual instructions lie behind all others.
  std::map<uint64_t, uint32_t> at;
  for (const Instruction& in : code) at[in.address] = in.index;
  const int first_half = static_cast<int>(code.size());
  for (Instruction& in : code) {
    if (in.second >= 0) in.second += first_half;
    if (in.klass != Class::kBranch || in.run == nullptr || !starts(in.text, "s_") ||
        in.text.find("pc_b64") != std::string::npos)
      continue;
    const auto target = at.find(in.address + 4 + static_cast<uint64_t>(static_cast<int64_t>(in.offset) * 4));
    if (target == at.end()) fault("branch to nowhere in '", in.text, "'");
    in.target = target->second;
  }
  code.insert(code.end(), halves.begin(), halves.end());
  return code;
}

Operations::Operations() {
  add_scalar(*this);
  add_integer(*this);
  add_float(*this);
  add_compare(*this);
  add_lane(*this);
  add_matrix(*this);
  add_memory(*this);
  std::sort(sorted_.begin(), sorted_.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
}

void Operations::add(const std::string& name, Operation op) { sorted_.emplace_back(name, std::move(op)); }

const Operation* Operations::find(const std::string& name) const {
  const auto at = std::lower_bound(sorted_.begin(), sorted_.end(), name,
                                   [](const auto& a, const std::string& n) { return a.first < n; });
  return at != sorted_.end() && at->first == name ? &at->second : nullptr;
}

}  // namespace rdna
